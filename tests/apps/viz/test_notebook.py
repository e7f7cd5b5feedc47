"""Pictures as the values of cells: in Python, in a notebook that is run, and in JupyterLab."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dinov2_attn import viz
from dinov2_attn.apps.viz.mosaic import RED
from dinov2_attn.apps.viz.results import figure_of
from dinov2_attn.maps.artifacts import ArtifactTokens
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.rollout import Rollout
from tests.support import browser
from tests.support.strategies import noise

GRID, PREFIX, HEADS, N = (6, 8), 3, 4, 51
BRIGHT = (2, 5)


def maps_of(*layers):
    weights = tuple(noise(1, HEADS, N, N, seed=i).softmax(-1) for i in range(len(layers)))
    return AttentionMaps(weights, layers, GRID, PREFIX)


def artifacts_of(value=300.0):
    """Norms near 40, and one artifact."""
    norms = 40 + noise(1, *GRID, seed=1)
    norms[0][BRIGHT] = value
    mask, shares = norms > 100, torch.full((1, *GRID), 0.01)
    return ArtifactTokens(
        mask, norms, torch.tensor([7]), torch.tensor([100.0]), shares, shares, mask, mask
    )


def pixels_of(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


# What is a value of a cell


def test_plots_show_themselves():
    maps, image = maps_of(3, 5), np.zeros((60, 80, 3), np.uint8)
    for shown in (
        viz.plot(maps, image=image),
        viz.plot_heads(maps, image=image),
        viz.plot_layers(maps),
        viz.plot_masks(maps, 0.6, image=image),
        viz.figure(maps, [image]),
    ):
        pixels = pixels_of(shown._repr_png_())
        assert pixels.shape[0] > 150
        assert pixels.shape[1] > 300
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_axes_of_the_user_do_not():
    ax = Figure().add_subplot()
    assert viz.plot(maps_of(3), ax) is ax
    assert not hasattr(ax, "_repr_png_")


def test_the_picture_of_artifacts_has_the_marks_and_limits_of_the_others():
    figure = figure_of(artifacts_of())
    image = figure.axes[0].images[0]
    assert image.norm.vmin == 0
    assert image.norm.vmax < 60  # the artifact does not count
    assert image.cmap.name == "viridis"
    red = np.round(255 * np.array(RED)).astype(int)
    pixels = pixels_of(artifacts_of()._repr_png_())
    assert (np.abs(pixels - red).max(-1) < 8).any()
    none = pixels_of(artifacts_of(41.0)._repr_png_())
    assert not (np.abs(none - red).max(-1) < 8).any()
    bar = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert bar[0] == "0"
    assert not any("×" in label or "%" in label for label in bar)


def test_the_picture_of_a_rollout_counts_in_multiples_of_uniform():
    weights = noise(1, 1, N, seed=3).softmax(-1)
    figure = figure_of(Rollout(weights, GRID, PREFIX, (PREFIX + 9,)))
    image = figure.axes[0].images[0]
    patches = weights[0, 0, PREFIX:].reshape(GRID).double().numpy() * N
    assert np.abs(np.asarray(image.get_array()) - patches).max() < 1e-6
    assert image.norm.vmin == 0
    texts = " ".join(text.get_text() for text in figure.texts)
    assert "Attention rollout of patch (1, 1)." in texts
    assert "uniform attention" in texts
    assert any("×" in label.get_text() for label in figure.axes[1].get_yticklabels())


# The input tensor as an image


def test_the_input_of_the_model_is_shown_as_it_was():
    soft = np.stack(np.meshgrid(np.linspace(0, 255, 80), np.linspace(0, 255, 60)), -1)
    picture = np.concatenate([soft, 255 - soft[..., :1]], -1).astype(np.uint8)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    tensor = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - mean) / std
    style = viz.Style(background="colour", alpha=0.01)
    for image in (tensor, tensor[None], tensor * std + mean, tensor.requires_grad_()):
        shown = viz.plot(maps_of(3), image=image, style=style).images[0].get_array()
        assert np.abs(np.asarray(shown) - picture / 255).max() < 1e-5


# A notebook that is run

CELLS = [
    """import numpy as np, torch
from dinov2_attn import AttentionMaps, viz
generator = torch.Generator().manual_seed(0)
weights = [torch.randn(1, 4, 51, 51, generator=generator).mul(2).softmax(-1) for _ in "ab"]
maps = AttentionMaps(tuple(weights), (3, 5), (6, 8), 3)
image = np.random.default_rng(0).integers(0, 255, (84, 112, 3), np.uint8)
len(maps), maps[5].shape, maps.at(5, 3, (2, 4)).shape""",
    "maps",
    "viz.plot(maps, layer=5, head=3, image=image)",
    "viz.plot_heads(maps, image=image)",
    "viz.explore(maps, image, title='in a notebook')",
]


def notebook(path):
    nbformat = pytest.importorskip("nbformat", reason="nbformat (of JupyterLab) is not installed")
    book = nbformat.v4.new_notebook()
    book.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    book.cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    nbformat.write(book, path)
    return book


def test_every_cell_of_a_notebook_shows_something(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient (of JupyterLab) is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    book = notebook(tmp_path / "book.ipynb")
    nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [cell.outputs[-1].data for cell in book.cells]
    assert outputs[0]["text/plain"] == "(2, torch.Size([1, 4, 51, 51]), torch.Size([6, 8]))"
    assert outputs[1]["text/plain"].startswith("AttentionMaps(layers=3, 5, weights=")
    assert "<img" in outputs[1]["text/html"]
    for output in outputs[2:4]:
        assert pixels_of(base64.b64decode(output["image/png"])).shape[1] > 300
    assert "<iframe" in outputs[4]["text/html"]
    assert len(json.dumps(outputs[4])) < 1_000_000


# JupyterLab

TOKEN = "of-this-test"
SESSION = "window.jupyterapp.shell.currentWidget.sessionContext"
OPTIONS = (
    "--no-browser",
    "--allow-root",
    "--ServerApp.ip=127.0.0.1",
    f"--IdentityProvider.token={TOKEN}",
    "--LabApp.expose_app_in_browser=True",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
)
# Where Jupyter keeps what it writes: all of it in the folder of the test.
HOMES = ("CONFIG", "DATA", "RUNTIME")


@contextmanager
def jupyterlab(folder):
    """Run JupyterLab on ``folder``. Yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", *OPTIONS]
    command += [f"--ServerApp.port={port}", f"--ServerApp.root_dir={folder}"]
    own = {f"JUPYTER_{home}_DIR": str(folder / home) for home in HOMES}
    own |= {f"JUPYTERLAB_{home}_DIR": str(folder / home) for home in ("SETTINGS", "WORKSPACES")}
    own["IPYTHONDIR"] = str(folder / "ipython")
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **own})
    try:
        yield answering(f"http://127.0.0.1:{port}", folder / "log")
    finally:
        server.terminate()
        server.wait(30)


def answering(address, log):
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=5).read()
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.3)
        else:
            return address


def until(page, script, seconds=90):
    end = time.monotonic() + seconds
    while not page.run(script):
        assert time.monotonic() < end, script
        time.sleep(0.2)


def run_all_cells(page, address, name):
    """Open a notebook in JupyterLab, and begin to run all of its cells."""
    page.driver.get(f"{address}/lab/tree/{name}?token={TOKEN}")
    until(page, "return Boolean(window.jupyterapp?.shell.currentWidget?.context?.isReady)")
    until(page, f"return {SESSION}.session?.kernel?.connectionStatus === 'connected'")
    page.run("void window.jupyterapp.commands.execute('notebook:run-all-cells')")


def test_jupyterlab_shows_pictures_and_the_page(tmp_path):
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    if browser.lacking():
        pytest.skip(f"missing here: {browser.lacking()}")
    notebook(tmp_path / "book.ipynb")
    with jupyterlab(tmp_path) as address, browser.chromium(reaches="127.0.0.1") as page:
        page.screen(1400, 3600)
        run_all_cells(page, address, "book.ipynb")
        until(page, "return document.querySelectorAll('.jp-OutputArea-output iframe').length === 1")
        images = "[...document.querySelectorAll('.jp-OutputArea-output img')]"
        until(page, f"return {images}.filter((it) => it.naturalWidth > 300).length === 3")
        assert page.run(f"return {images}.every((it) => it.getBoundingClientRect().width > 200)")
        shot = os.environ.get("DINOV2_ATTN_SHOTS")
        page.driver.switch_to.frame(
            page.driver.find_element("css selector", ".jp-OutputArea iframe")
        )
        until(page, "return document.getElementById('sentence')?.textContent !== ''")
        assert page.text("token") == "CLS"
        assert page.text("caption") == "CLS · layer 5, mean of heads"
        width = page.run("return innerWidth")
        photo, shown = (page.run(BOX, one) for one in ("#photo", "#map"))
        assert 0 <= photo[0] < photo[2] <= shown[0] < shown[2] <= width
        page.run("document.querySelectorAll('#heads button')[2].click()")
        assert page.text("caption") == "CLS · layer 5, head 1"
        page.driver.switch_to.default_content()
        if shot:
            page.screenshot(f"{shot}/jupyterlab.png")


BOX = """
const box = document.querySelector(arguments[0]).getBoundingClientRect();
return [box.left, box.top, box.right, box.bottom];
"""
