"""How far two ways of computing the same attention may be apart: once, for each dtype.

Differences are measured against the largest value at hand, so that the numbers are those
of the dtype (a few units in its last place, times the length of the sums) and not of the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 3e-2}


def assert_close(
    what: str,
    ours: Tensor,
    theirs: Tensor,
    *,
    dtype: torch.dtype | None = None,
    size: float | None = None,
) -> None:
    """Fail, saying ``what`` was compared, unless ``ours`` is ``theirs`` within the tolerance.

    The dtype is that of ``ours`` and the size that of the largest value if not given.
    """
    __tracebackhide__ = True
    assert_shape(what, ours, tuple(theirs.shape))
    if not ours.numel():
        return
    dtype, left, right = dtype or ours.dtype, ours.detach().double(), theirs.detach().double()
    limit = RELATIVE[dtype] * (size or right.abs().max().item())
    gap = (left - right).abs().max().item()
    if not gap <= limit:  # NaN is a failure too
        raise AssertionError(
            f"expected {what} within {limit:.1g} (computed in {dtype}); found {gap:.1g} apart"
        )


def assert_identical(what: str, before: list[Tensor], after: list[Tensor]) -> None:
    """Fail unless both hold the same tensors, bit for bit."""
    __tracebackhide__ = True
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        if not torch.equal(a, b):
            gap = (a.double() - b.double()).abs().max().item() if a.shape == b.shape else "shape"
            raise AssertionError(f"expected {what}, bit for bit; found part {i} apart by {gap}")


def assert_shape(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Fail unless ``tensor`` has ``shape``."""
    __tracebackhide__ = True
    if tuple(tensor.shape) != shape:
        raise AssertionError(f"expected {what} of shape {shape}; found {tuple(tensor.shape)}")
