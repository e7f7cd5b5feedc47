"""README.md and docs/: Python runs, commands are understood, figures are measured, links lead."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import dinov2_attn
from dinov2_attn.apps.cli.main import _parser
from tests.support.extraction import draw
from tests.support.strategies import randomise

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
OUTER = [
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "AGENTS.md", "SECURITY.md", "tests/README.md")),
]

# A block that cannot run everywhere says why, in the line above it.
NOT_RUN = r"<!-- not run: [^>]+ -->\n"
PYTHON = re.compile(rf"({NOT_RUN})?^```python\n(.*?)^```", re.S | re.M)
SHELL = re.compile(r"^```sh\n(.*?)^```", re.S | re.M)
# Names that users replace by their own, and programs that are called by another one.
PLACES = (
    r"(?<![\w./-])(?:src|tests|tools|docs|benchmarks|typing_tests|patches|\.ci|\.github)/[\w./-]*\w"
)


def named(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    """Return the Python of ``page`` that runs."""
    return [code for not_run, code in PYTHON.findall(page.read_text("utf-8")) if not not_run]


def commands(page):
    """Return the arguments of each call of ``dinov2-attn`` in ``page``."""
    lines = "\n".join(SHELL.findall(page.read_text("utf-8"))).splitlines()
    calls = [line.partition("dinov2-attn ")[2] for line in lines if "dinov2-attn " in line]
    return [shlex.split(call, comments=True) for call in calls]


def rows(page):
    return [line for line in page.read_text("utf-8").splitlines() if line.startswith("|")]


def test_the_table_of_costs_is_quoted_from_the_benchmark():
    measured = rows(ROOT / "benchmarks" / "results" / "cost.md")
    every = rows(ROOT / "docs" / "costs.md")
    on_a_gpu = every.index("| what | 518, bfloat16 | 952, bfloat16 | 518, float32 |")
    quoted = every[:on_a_gpu]
    assert len(quoted) > 10
    assert [line for line in quoted if line not in measured] == []


def test_the_costs_in_the_readme_are_those_of_the_table():
    quoted = re.findall(r"^\| (.+) \| (\d\.\d\d) × \|$", README.read_text("utf-8"), re.M)
    costs = (ROOT / "docs" / "costs.md").read_text("utf-8")
    assert len(quoted) == 5
    for what, times in quoted:
        assert f"| {what} | vit_small, 518 | {times} × upstream's forward" in costs


def test_the_costs_of_timm_are_those_of_the_table():
    text = (ROOT / "docs" / "migration.md").read_text("utf-8")
    timm, ours = re.findall(r"takes (\d\.\d\d) times", text)
    costs = (ROOT / "docs" / "costs.md").read_text("utf-8")
    assert f"| timm AttentionExtract, last block, full | vit_small, 518 | {timm} ×" in costs
    assert f"| last block, full | vit_small, 518 | {ours} ×" in costs


def test_the_tables_for_planning_are_those_of_the_benchmark():
    results = ROOT / "benchmarks" / "results"
    measured = [row for kind in ("cuda", "cpu") for row in rows(results / f"scale-{kind}.md")[2:]]
    quoted = [row for row in rows(ROOT / "docs" / "scale.md") if row.startswith("| vit_")]
    assert quoted == measured
    text = (ROOT / "docs" / "scale.md").read_text("utf-8")
    rate = {row.split(" | ")[0]: row.split(" | ")[2:6] for row in rows(results / "scale-cuda.md")}
    plain, cls, numbers, matrices = (1e6 / float(one) / 60 for one in rate["| vit_base, 518"])
    assert f"{plain:.0f} minutes without attention, {cls:.0f} minutes with CLS rows" in text
    assert f"{numbers / 60:.1f} hours\nwith statistics and {matrices:.0f} minutes" in text


def test_the_rate_of_extraction_is_that_of_the_benchmark():
    measured = (ROOT / "benchmarks" / "results" / "extract.md").read_text("utf-8")
    text = (ROOT / "docs" / "extraction.md").read_text("utf-8").replace("\n", " ")
    rate, *ratios = re.findall(r"(\d+\.\d) images/s|(\d\.\d\d) times", text)
    assert f"| {rate[0]} | {ratios[0][1]} × |" in measured
    assert all(f"| {ratio} × |" in measured for _, ratio in ratios)


@pytest.fixture
def folder(first, tmp_path, monkeypatch):
    """A folder with the files that pages name, and torch.hub with a small model of real classes."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    transformer = first.cls("DinoVisionTransformer")
    shape = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "num_heads": 6, "depth": 12}
    model = randomise(transformer(**shape, block_chunks=0), 0)
    for name in ("teacher_checkpoint.pth", "student.pth"):
        torch.save({"teacher": model.state_dict()}, name)
    monkeypatch.setattr(torch.hub, "load", lambda *_: model.eval())
    draw(tmp_path / "cat.jpg", (70, 126), 0)
    draw(tmp_path / "photos" / "a.png", (70, 126), 1)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=named)
def test_its_python_runs_from_top_to_bottom(page, folder):
    names = {}
    for block in blocks(page):
        exec(compile(block, named(page), "exec"), names)
    dinov2_attn.uninstall()


def test_each_block_of_the_readme_runs_in_an_empty_file(folder):
    first, second = ({}, {})
    for names, block in zip((first, second), blocks(README), strict=True):
        exec(compile(block, "README.md", "exec"), names)
    assert first["weights"].shape == (1, 6, 1513, 1513)  # 42 × 36 patches, and CLS
    assert (folder / "attention.png").stat().st_size > 1000
    assert second["maps"].patch_maps()[11].shape == (1, 6, 1, 16, 16)


def test_what_is_read_out_of_an_extraction_is_there(folder):
    names = {}
    for block in blocks(ROOT / "docs" / "extraction.md"):
        exec(block, names)
    assert names["image"]["path"] == "a.png"
    assert names["maps"].shape == (12, 1, 16, 16)


def test_pages_that_are_named_hold_python():
    assert {page.name for page in PAGES if blocks(page)} >= {
        *("README.md", "quickstart.md", "recording.md", "pictures.md", "checkpoints.md"),
        *("extraction.md", "editing.md", "api.md", "migration.md", "mathematics.md", "types.md"),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=named)
def test_its_commands_are_understood(page):
    for arguments in commands(page):
        assert callable(_parser().parse_args(arguments).run)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_its_blocks_are_of_languages_that_are_run_or_are_text(page):
    fences = re.findall(r"^ *```(.*)$", page.read_text("utf-8"), re.M)
    assert set(fences[::2]) <= {"python", "sh", "text"}
    assert set(fences[1::2]) <= {""}


def test_each_function_that_pages_name_is_there():
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    used = set(re.findall(r"\bdinov2_attn\.(\w+(?:\.\w+)?)\(", text))
    assert {"install", "load_checkpoint", "extract", "AttentionMaps.load"} <= used
    for path in used:
        found = dinov2_attn
        for name in path.split("."):
            found = getattr(found, name)
        assert callable(found)


def test_every_public_name_is_in_the_table_of_the_api():
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert [name for name in dinov2_attn.__all__ if name not in text] == []


@pytest.mark.parametrize("page", OUTER, ids=named)
def test_its_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    inside = [link for link in links if "://" not in link]
    assert [link for link in inside if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", OUTER, ids=named)
def test_files_that_it_names_exist(page):
    found = {place for place in re.findall(PLACES, page.read_text("utf-8")) if "*" not in place}
    assert [place for place in found if not (ROOT / place).exists()] == []


def test_the_readme_is_short_and_begins_with_what_runs():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 120
    assert text.index("```python") < text.index("bin/pytest")
    for command in ("bin/dinov2-attn demo", "bin/pytest"):  # .ci/run takes these lines
        assert sum(command in line for line in text.splitlines()) == 1
