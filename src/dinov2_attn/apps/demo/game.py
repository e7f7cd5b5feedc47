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

# A way, right or wrong, to turn the patch columns of a row into a map.
Reading = Callable[[Tensor, Grid], Tensor]


def held_out(count: int = 200) -> list[Scene]:
    """Return scenes that were not used in training; half of the grids are square.

    Scenes where a transposed map still hits the target are left out, because they cannot detect a
    transposition. An example is a target on the diagonal of a square.

    Args:
        count: The number of scenes.

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
    """Return the row ``(N,)`` with all attention on the patch of the target."""
    covered = functional.avg_pool2d(torch.from_numpy(scene.mask)[None].float(), PATCH).flatten()
    return functional.one_hot(1 + covered.argmax(), 1 + covered.numel()).float()


def _transposed(scene: Scene) -> list[str]:
    # Swapping height and width does not change a square.
    return [TRANSPOSED] if scene.grid[0] == scene.grid[1] else [TRANSPOSED, SWAPPED]


def to_tensor(scenes: Sequence[Scene]) -> Tensor:
    """Return scenes of one size as normalised images, float32 (B, 3, H, W)."""
    pictures = torch.from_numpy(np.stack([scene.picture for scene in scenes]))
    return ((pictures / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(0, 3, 1, 2)


def cls_rows(model: Any, scenes: Sequence[Scene]) -> list[Tensor]:
    """Return the CLS row of the last block for each scene, the mean of heads.

    Args:
        model: A grafted model.
        scenes: Scenes, which may differ in size.

    Returns:
        One row ``(N,)`` per scene, CLS first.

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

    Such a map is flat near the border. The centre of equal maxima is returned.
    """
    pixels = functional.interpolate(values[None, None].double(), size, mode="bilinear")[0, 0]
    y, x = (pixels >= pixels.max() * (1 - 1e-9)).nonzero().double().mean(0).tolist()
    return int(y), int(x)


def hits(rows: Sequence[Tensor], scenes: Sequence[Scene], reading: str = RIGHTLY) -> list[bool]:
    """Return for each scene whether the maximum of its row, in this reading, is on the target."""
    read = READINGS[reading]
    maps = [read(row[1:], scene.grid) for row, scene in zip(rows, scenes, strict=True)]
    return [
        bool(scene.mask[peak(values, scene.mask.shape)])
        for values, scene in zip(maps, scenes, strict=True)
    ]


def chance(scenes: Sequence[Scene]) -> float:
    """Return the hit rate of a random pixel: the mean share of the area that the target covers."""
    return float(np.mean([scene.mask.mean() for scene in scenes]))


def table(model: Any, scenes: Sequence[Scene]) -> list[str]:
    """Return a Markdown table of hit rates by reading, on square and other grids."""
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
