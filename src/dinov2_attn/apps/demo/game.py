"""The pointing game: whether the maximum of a map lies on the object."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dinov2_attn.apps.demo.scenes import PATCH, Grid, Scene, draw
from dinov2_attn.apps.viz.reading import DEVIATION, MEAN

BATCH = 64
SIDES = (5, 13)  # of held-out grids, in patches; the end is excluded

# What a wrong reader makes of the patch columns of a row: a map of some shape.
Reading = Callable[[Tensor, Grid], Tensor]


def held_out(count: int = 200) -> list[Scene]:
    """Draw the scenes on which the model is measured: half of them square, half of them not.

    Left out are those that could not tell: where a transposition would lead back to the target,
    as it does on the diagonal of a square.
    """
    random = np.random.RandomState(count)
    scenes: list[Scene] = []
    for seed in range(10 * count):
        height, width = (int(side) for side in random.randint(*SIDES, 2))
        if len(scenes) % 2 == 0:
            width = height
        elif width == height:
            width = height + 1
        scene = draw(seed, (height, width))
        if not any(hits([ideal(scene)], [scene], reading)[0] for reading in _transposed(scene)):
            scenes.append(scene)
        if len(scenes) == count:
            break
    return scenes


def ideal(scene: Scene) -> Tensor:
    """Return the row ``(N,)`` of one who looks at the target's patch and nowhere else."""
    covered = functional.avg_pool2d(torch.from_numpy(scene.mask)[None].float(), PATCH).flatten()
    return functional.one_hot(1 + covered.argmax(), 1 + covered.numel()).float()


def _transposed(scene: Scene) -> list[str]:
    # A square whose height and width are swapped is the same.
    return [TRANSPOSED] if scene.grid[0] == scene.grid[1] else [TRANSPOSED, SWAPPED]


def to_tensor(scenes: Sequence[Scene]) -> Tensor:
    """Return scenes of one size as a model takes them: float32 (B, 3, H, W), normalised."""
    pictures = torch.from_numpy(np.stack([scene.picture for scene in scenes]))
    return ((pictures / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(0, 3, 1, 2)


def cls_rows(model: Any, scenes: Sequence[Scene]) -> list[Tensor]:
    """Return for each scene what CLS gives to every token in the last block, the mean of heads.

    Each is ``(N,)``, CLS first. ``model`` is grafted; scenes may differ in size.
    """
    order = sorted(range(len(scenes)), key=lambda i: scenes[i].grid)
    rows: dict[int, Tensor] = {}
    for _, same in itertools.groupby(order, key=lambda i: scenes[i].grid):
        indices = list(same)
        images = to_tensor([scenes[i] for i in indices])
        with torch.no_grad():
            batches = [
                model.get_last_self_attention(batch, queries="cls", heads="mean")
                for batch in torch.split(images, BATCH)
            ]
        rows.update(zip(indices, torch.cat(batches)[:, 0], strict=True))
    return [rows[i] for i in range(len(scenes))]


def _rightly(patches: Tensor, grid: Grid) -> Tensor:
    return patches.reshape(grid)


def _column_by_column(patches: Tensor, grid: Grid) -> Tensor:
    return patches.reshape(grid[1], grid[0]).T


def _swapped(patches: Tensor, grid: Grid) -> Tensor:
    return patches.reshape(grid[1], grid[0])


def _shifted(tokens: int) -> Reading:
    return lambda patches, grid: patches.roll(tokens).reshape(grid)


def _row_too_low(patches: Tensor, grid: Grid) -> Tensor:
    return patches.reshape(grid).roll(1, dims=0)


RIGHTLY = "rightly: row by row"
TRANSPOSED = "transposed: column by column"
SWAPPED = "(w, h) for (h, w), stretched over the picture"
READINGS: dict[str, Reading] = {
    RIGHTLY: _rightly,
    TRANSPOSED: _column_by_column,
    SWAPPED: _swapped,
    "one token late": _shifted(1),
    "one token early": _shifted(-1),
    "one row of patches too low": _row_too_low,
}


def peak(values: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """Return the pixel (y, x) of the maximum of a map, upsampled bilinearly to ``size``.

    Towards the border of the picture such a map is flat: among equals the middle is taken.
    """
    pixels = functional.interpolate(values[None, None].double(), size, mode="bilinear")[0, 0]
    y, x = (pixels >= pixels.max() * (1 - 1e-9)).nonzero().double().mean(0).tolist()
    return int(y), int(x)


def hits(rows: Sequence[Tensor], scenes: Sequence[Scene], reading: str = RIGHTLY) -> list[bool]:
    """Say for each scene whether its row, read in that way, points at the target."""
    read = READINGS[reading]
    maps = [read(row[1:], scene.grid) for row, scene in zip(rows, scenes, strict=True)]
    return [
        bool(scene.mask[peak(values, scene.mask.shape)])
        for values, scene in zip(maps, scenes, strict=True)
    ]


def chance(scenes: Sequence[Scene]) -> float:
    """Return the share of hits of one who points anywhere: the target's mean share of the area."""
    return float(np.mean([scene.mask.mean() for scene in scenes]))


def table(model: Any, scenes: Sequence[Scene]) -> list[str]:
    """Measure every reading on scenes that are square and that are not: lines of Markdown."""
    halves = [
        [scene for scene in scenes if (scene.grid[0] == scene.grid[1]) == square]
        for square in (True, False)
    ]
    rows = [cls_rows(model, half) for half in halves]
    lines = ["| patches read | square | not square |", "|---|---|---|"]
    for reading in READINGS:
        shares = [float(np.mean(hits(*half, reading))) for half in zip(rows, halves, strict=True)]
        lines.append(_line(reading, shares))
    return [*lines, _line("chance: the target's share of the area", [*map(chance, halves)])]


def _line(name: str, shares: Sequence[float]) -> str:
    return f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |"
