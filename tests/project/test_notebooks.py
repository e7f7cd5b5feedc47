"""The notebooks: each runs from top to bottom, and its cells show what the text says."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.apps.viz.test_notebook import SESSION, jupyterlab, run_all_cells, until
from tests.support import browser
from tests.support.upstreams import FIRST, fetch_wheel

ROOT = Path(__file__).parents[2]
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = "https://colab.research.google.com/github/dinov2-attn/dinov2-attn/blob/main"


def named(path):
    return path.name


@pytest.fixture(params=BOOKS, ids=named)
def book(request):
    return request.param


def sources(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells]


def test_there_are_four():
    wanted = {"quickstart", "bright_pixel", "explain_classifier", "compare_checkpoints"}
    assert {path.stem for path in BOOKS} == wanted


def test_nothing_of_a_run_is_stored(book):
    stored = json.loads(book.read_text("utf-8"))
    code = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_it_opens_in_colab_and_installs_the_package_there(book):
    first, install, *_ = sources(book)
    assert f"({REPOSITORY}/notebooks/{book.name})" in first
    assert first.startswith("# ")
    assert "%pip install" in install
    assert 'find_spec("dinov2_attn") is None' in install


def test_it_says_what_the_model_is(book):
    assert "It says nothing about Meta's weights" in sources(book)[0]


def test_each_is_named_in_the_documentation():
    page = (ROOT / "docs" / "pictures.md").read_text("utf-8")
    assert set(re.findall(r"\(\.\./notebooks/([\w.]+)\)", page)) == {path.name for path in BOOKS}


# Run, one after the other


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a notebook; return the values of its cells, by the last line of their code."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("notebooks")

    def of(name):
        book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
        paths = [str(fetch_wheel(FIRST.wheel)), str(ROOT / "src")]
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([before] if before else [])])
        try:
            client = nbclient.NotebookClient(
                book,
                timeout=600,
                startup_timeout=300,
                resources={"metadata": {"path": str(folder)}},
            )
            client.execute()
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
        code = [
            cell for cell in book.cells if cell.cell_type == "code" and "%pip" not in cell.source
        ]
        return [
            (cell.source, output.data)
            for cell in code
            for output in cell.outputs
            if output.output_type == "execute_result"
        ]

    return of


def values(shown):
    return [data["text/plain"] for _, data in shown]


def pictures(shown):
    """Return how many cells have a picture, or HTML with one."""
    return sum("image/png" in data or "<img" in data.get("text/html", "") for _, data in shown)


def test_the_quick_start_shows_maps_pictures_and_the_page(run):
    shown = run("quickstart")
    assert pictures(shown) == 3
    assert "torch.Size([1, 2, 109, 109])" in values(shown)[0]
    assert "<iframe" in shown[-1][1]["text/html"]


def test_the_bright_pixel_is_the_planted_artifact(run):
    shown = run("bright_pixel")
    assert pictures(shown) == 5
    (found,) = [text for text in values(shown) if text.startswith("[(")]
    assert re.match(r"\[\(7, 10, \d+, 0\.\d+\)\]$", found), "one artifact, the planted one"


def test_the_classifier_is_right_and_looks_at_the_disc(run):
    shown = run("explain_classifier")
    accuracy, place, answers = (
        next(text for (code, _), text in zip(shown, values(shown), strict=True) if end in code)
        for end in ("accuracy  #", "(row, column), on_the_disc", "whole, without_relevant")
    )
    assert float(accuracy) > 0.85
    assert place.endswith("True)")
    whole, relevant, ground = map(float, re.findall(r"-?\d+\.\d+", answers))
    assert whole - relevant > 1, "hiding the most relevant patch changes the answer"
    assert abs(whole - ground) < 0.1, "hiding the ground does not"


def test_the_trained_checkpoint_finds_more_discs(run):
    shown = run("compare_checkpoints")
    early, late = map(float, re.findall(r"\d\.\d+", values(shown)[0]))
    assert late > 0.9
    assert early < 0.6
    assert pictures(shown) == 2
    assert "Model B" in shown[-1][1]["text/html"]


CELLS = (
    "[...window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells]"
    ".filter((cell) => cell.cell_type === 'code')"
)
PICTURES = {"quickstart": 3, "bright_pixel": 5, "explain_classifier": 1, "compare_checkpoints": 2}


def test_jupyterlab_runs_every_cell_and_shows_the_pictures(book, tmp_path, monkeypatch):
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed: nbclient runs them")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    if browser.lacking():
        pytest.skip(f"missing here: {browser.lacking()}")
    shutil.copy(book, tmp_path)
    paths = [fetch_wheel(FIRST.wheel), ROOT / "src", *os.environ.get("PYTHONPATH", "").split(":")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, filter(None, paths))))
    with jupyterlab(tmp_path) as address, browser.chromium(reaches="127.0.0.1") as page:
        page.screen(1400, 9000)
        run_all_cells(page, address, book.name)
        until(page, f"return {CELLS}.every((cell) => cell.execution_count)", 300)
        until(page, f"return {SESSION}.session.kernel.status === 'idle'", 300)
        outputs = f"{CELLS}.flatMap((cell) => cell.getOutputs())"
        assert page.run(f"return {outputs}.filter((one) => one.output_type === 'error')") == []
        images = "[...document.querySelectorAll('.jp-OutputArea-output img')]"
        wide = f"{images}.filter((image) => image.naturalWidth > 200).length"
        until(page, f"return {wide} >= {PICTURES[book.stem]}")
        if shots := os.environ.get("DINOV2_ATTN_SHOTS"):
            page.screenshot(f"{shots}/{book.stem}.png")
