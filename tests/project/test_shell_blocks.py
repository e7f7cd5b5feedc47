"""Shell blocks of README.md and docs/: each line is run, or is listed here with a reason."""

from __future__ import annotations

import glob
import shlex

import pytest
import torch

from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.demo import load
from dinov2_attn.apps.viz.videos import is_readable
from dinov2_attn.apps.weights.models import build
from tests.project.test_readme import PAGES, SHELL, named
from tests.support.extraction import draw
from tests.support.videos import bright, write_video

# Where such a line begins, and why no test of this file runs it.
NOT_RUN = {
    "pip install 'dinov2-attn[viz] @ git+": "needs GitHub",
    "pip install '.[viz]'": ".ci/run does it by the next line",
    "python3 -m venv .venv && .venv/bin/pip install -q '.[viz]'": "the first thing .ci/run does",
    "python3 -m venv .venv && .venv/bin/pip install -q -e": "these tests; .ci/run runs it",
    "hf download": "downloads weights",
    "dinov2-attn heatmap photo.jpg -o out --weights facebook/dinov2-small": (
        "needs what `hf download` brings; tests/apps/weights/test_other_checkpoints.py"
    ),
    "dinov2-attn heatmap photo.jpg -o out --model dinov3_vits16": "needs weights under a licence",
    "pytest --pyargs dinov2_attn.conformance": "minutes; tests/proof/test_conformance.py",
    "dinov2-attn verify": "minutes; tests/proof/test_verify.py",
    "dinov2-attn export": "needs onnxruntime; tests/apps/export/test_onnx.py",
    "dinov2-attn extract photos -o out-tables": (
        "needs pyarrow and zarr; tests/apps/extraction/test_extract_zarr.py and …_parquet.py"
    ),
    "torchrun": "eight GPUs; tests/apps/extraction/test_extract_ranks.py",
    "tools/wild": "minutes; tests/wild/test_wild.py",
}


def lines(page):
    """Return the lines of the shell blocks of ``page``."""
    text = "\n".join(SHELL.findall(page.read_text("utf-8")))
    return [line for line in text.splitlines() if line]


def reason(line):
    """Return why ``line`` is not run; ``None`` if it is."""
    if {"clip.mp4", "frames"} & set(line.split()) and not is_readable():
        return "needs PyAV"
    return next((why for start, why in NOT_RUN.items() if line.startswith(start)), None)


def expanded(line):
    """Return the arguments of ``dinov2-attn`` in ``line`` as a shell gives them."""
    program, *words = shlex.split(line, comments=True)
    assert program == "dinov2-attn"
    return [path for word in words for path in (sorted(glob.glob(word)) or [word])]


def to_run(page):
    return [line for line in lines(page) if reason(line) is None]


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder of torch.hub's with a ViT-S and a classifier of random weights, not Meta's."""
    folder = tmp_path_factory.mktemp("hub")
    file = folder / "hub" / "checkpoints" / "dinov2_vits14_pretrain.pth"
    file.parent.mkdir(parents=True)
    torch.save(build("vit_small").state_dict(), file)
    linear = torch.nn.Linear(5 * 384, 1000)
    torch.save(linear.state_dict(), file.with_name("dinov2_vits14_linear4_head.pth"))
    return folder


@pytest.fixture
def folder(first, tmp_path, monkeypatch, request):
    """A folder with the files that pages name, and weights that need no network."""
    pytest.importorskip("matplotlib")
    first.module("dinov2.models.vision_transformer")
    monkeypatch.setenv("TORCH_HOME", str(request.getfixturevalue("hub")))
    monkeypatch.chdir(tmp_path)
    for name in ("teacher_checkpoint.pth", "student.pth"):
        torch.save({"teacher": load.load_demo_model().state_dict()}, name)
    for seed, name in enumerate(("cat.jpg", "photo.jpg", "a.jpg", "b.jpg", "more/c.jpg")):
        draw(tmp_path / name, (70, 252), seed)
    draw(tmp_path / "photos" / "a.png", (70, 126), 0)
    draw(tmp_path / "frames" / "f0.png", (70, 126), 0)
    if is_readable():
        write_video(tmp_path / "clip.mp4", [bright((1, 1))])
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)], ids=named)
def test_its_commands_run_one_after_the_other(page, folder, capsys):
    for line in to_run(page):
        assert main(expanded(line)) == 0, line
        output = capsys.readouterr().out
        words = shlex.split(line, comments=True)
        if "-o" not in words:
            assert output, line
            continue
        written = folder / words[words.index("-o") + 1]
        assert written.is_file() or any(written.iterdir()), line


def test_what_is_not_run_is_in_a_page():
    found = {
        start
        for page in PAGES
        for line in lines(page)
        for start in NOT_RUN
        if line.startswith(start)
    }
    assert found == NOT_RUN.keys()
