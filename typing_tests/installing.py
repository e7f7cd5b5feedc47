"""``install``, checkpoints, extraction and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from typing_extensions import assert_type

import dinov2_attn
from dinov2_attn import AttentionMaps, Handle, Recording, viz
from dinov2_attn.apps.extraction.job import Summary
from dinov2_attn.apps.extraction.preview import Preview
from dinov2_attn.apps.extraction.read import AttentionDataset, Row


def install(model: nn.Module) -> None:
    assert_type(dinov2_attn.install(), Handle)
    assert_type(dinov2_attn.install("some.package"), Handle)
    with dinov2_attn.install(model, fallback=False) as handle:
        assert_type(handle, Handle)
    assert_type(dinov2_attn.status().grafted, tuple[str, ...])


def load(model: nn.Module, path: Path) -> None:
    dinov2_attn.load_checkpoint(model, path, interpolate_pos_embed=True)


def extract(model: nn.Module, folder: Path, dry_run: bool) -> None:
    done = dinov2_attn.extract(model, folder, "out", layers=[0], queries="registers")
    assert_type(done, Summary)
    assert_type(dinov2_attn.extract(model, folder, "out", dry_run=True), Preview)
    assert_type(dinov2_attn.extract(model, folder, "out", dry_run=dry_run), Summary | Preview)


def read(folder: Path) -> None:
    dataset = dinov2_attn.AttentionDataset(folder)
    assert_type(dataset[0], Row)
    assert_type(dataset["a.jpg"], Row)
    assert_type(dataset[:10], AttentionDataset)
    assert_type(dataset.maps(-1), AttentionMaps)
    assert_type(dataset.positions(Path("a.jpg")), list[int])
    dataset.sheet("entropy", lowest=True).save("sheet.html")


def draw(maps: AttentionMaps, recording: Recording, ax: Axes) -> None:
    assert_type(viz.plot(maps, layer=11, head=3), Axes)
    assert_type(viz.plot(recording, ax, image=np.zeros((4, 6, 3))), Axes)
    assert_type(viz.plot_heads(maps), Figure)
    assert_type(viz.plot_layers(recording, query=(0, 1)), Figure)
    assert_type(viz.plot_masks(maps, 0.6, image=np.zeros((4, 6, 3))), Figure)
    paper = viz.figure([maps], [np.zeros((4, 6, 3))], columns=["photo", "mean", 0])
    assert_type(paper, viz.PaperFigure)
    assert_type(paper.caption, str)
    viz.Style(limits="each", cmap="inferno")
    viz.Style(limits=(0, 8))
    viz.save(viz.plot_heads(maps), "heads.png")


def turn_into_arrays(maps: AttentionMaps) -> None:
    assert_type(maps.numpy(), AttentionMaps[npt.NDArray[Any]])
