"""Images made of two, and the tokens that a model makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov2_attn.backbone.undisturbed import first_input
from dinov2_attn.typing import Grid

# Rows from … to …, columns from … to …, in pixels.
Box = tuple[int, int, int, int]
NOTHING: Box = (0, 0, 0, 0)

# The centres of the first and of the last row of cells, and of such columns, in pixels.
Centres = tuple[tuple[float, float], tuple[float, float]]

# Row and column of the cell of each pixel, or of each token.
Cells = tuple[Tensor, Tensor]

# Images with more values than this, all together, run one by one: 32 MiB in float32.
_VALUES_AT_ONCE = 2**23


class Unclear(Exception):
    """Why there is no layout."""


@dataclass(frozen=True)
class KindOfImages:
    """What a probe has to know of images ``(B, …, H, W)``, in the place of the images themselves.

    Attributes:
        shape: That of one image, ``(…, H, W)``.
        dtype: Their dtype.
        device: Their device.
        limits: The lowest and the highest value of the first image, as tensors: a GPU is not
            waited for.

    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    limits: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, images: Tensor) -> KindOfImages:
        first, limits = images[:1].detach(), (torch.zeros(()), torch.zeros(()))
        if images.numel() and images.is_floating_point():
            limits = first.amin(), first.amax()
        return cls(images.shape[1:], images.dtype, images.device, limits)


class Distances(NamedTuple):
    """How far the tokens of M images are from those of A and from those of B, ``(M, S, N)``.

    ``resolution`` is the step of the dtype at the longest token of A.
    """

    from_a: Tensor
    from_b: Tensor
    resolution: float


class Mosaics:
    """Runs images whose pixels are those of A or B, and measures how their tokens move."""

    def __init__(
        self, run: Callable[[Tensor], object], attention: nn.Module, kind: KindOfImages
    ) -> None:
        self._run, self._attention = run, attention
        self._a, self._b = _two_images(kind)
        self.height, self.width = kind.shape[-2:]

    @property
    def box(self) -> Box:
        """All of the image."""
        return 0, self.height, 0, self.width

    def mask(self, box: Box | None = None) -> Tensor:
        """Return a mask ``(H, W)`` that is true in ``box``, or everywhere."""
        top, bottom, left, right = self.box if box is None else box
        mask = torch.zeros(self.height, self.width, dtype=torch.bool, device=self._a.device)
        mask[top:bottom, left:right] = True
        return mask

    def distances(self, masks: list[Tensor]) -> Distances:
        """Return how far tokens are from A's and B's in images that are B where a mask is true."""
        images = self._tokens([self.mask(NOTHING), self.mask(), *masks])
        a, b = next(images), next(images)
        pairs = [((one - a).norm(dim=-1), (one - b).norm(dim=-1)) for one in images]
        from_a, from_b = (torch.stack(distances) for distances in zip(*pairs, strict=True))
        resolution = torch.finfo(a.dtype).eps * float(a.norm(dim=-1).max())
        return Distances(from_a, from_b, resolution)

    def _tokens(self, masks: list[Tensor]) -> Iterator[Tensor]:
        """Yield the tokens ``(S, N, C)`` of each image, for which large ones run one by one."""
        step = len(masks) if len(masks) * self._a.numel() <= _VALUES_AT_ONCE else 1
        for start in range(0, len(masks), step):
            yield from self._tokens_of_batch(masks[start : start + step])

    def _tokens_of_batch(self, masks: list[Tensor]) -> Tensor:
        batch = torch.stack([torch.where(mask, self._b, self._a) for mask in masks])
        tokens, called = first_input(partial(self._run, batch), self._attention)
        if not called:
            raise Unclear("the attention module was not called in the probe")
        if tokens is None or tokens.ndim != 3:
            found = "no tensor" if tokens is None else f"a tensor of shape {tuple(tokens.shape)}"
            raise Unclear(f"the input of the attention module is {found}, not (B, N, C)")
        if not len(tokens) or len(tokens) % len(batch):
            raise Unclear(f"a batch of {len(batch)} images became {len(tokens)} sequences")
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        return tokens.reshape(len(batch), -1, *tokens.shape[1:])


def cells_of_pixels(mosaics: Mosaics, grid: Grid, centres: Centres) -> Cells:
    """Return the row and the column of the cell of each pixel, ``(H, W)``.

    Each is in the cell whose centre is the nearest.
    """
    sizes = (mosaics.height, mosaics.width)
    numbers = []
    for size, count, (first, last) in zip(sizes, grid, centres, strict=True):
        step = (last - first) / (count - 1) if count > 1 and last > first else math.inf
        pixels = torch.arange(size, device="cpu") + 0.5
        numbers.append(((pixels - first) / step).round().clamp(0, count - 1).long())
    rows, columns = torch.meshgrid(*numbers, indexing="ij")
    device = mosaics.mask().device
    return rows.to(device), columns.to(device)


def centres_in(box: Box, grid: Grid) -> Centres:
    """Return the centres of equal cells that fill ``box``."""
    edges = ((box[0], box[1]), (box[2], box[3]))
    halves = [(end - start) / count / 2 for (start, end), count in zip(edges, grid, strict=True)]
    first, second = (
        (start + half, end - half) for (start, end), half in zip(edges, halves, strict=True)
    )
    return first, second


def _two_images(kind: KindOfImages) -> tuple[Tensor, Tensor]:
    """Return noise ``(…, H, W)`` between the limits, and the same half a range away."""
    low, high = (float(limit) for limit in kind.limits)
    if not math.isfinite(high - low) or low == high:
        low, high = 0.0, 1.0
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.rand(kind.shape, generator=generator, dtype=torch.float64, device="cpu")
    two = (low + (high - low) * ((noise + shift) % 1) for shift in (0.0, 0.5))
    a, b = (one.to(kind.device, kind.dtype) for one in two)
    return a, b
