"""How far two ways of computing the same attention may be apart: once, for each dtype.

Differences are measured against the largest value at hand, so that the numbers are those
of the dtype (a few units in its last place, times the length of the sums) and not of the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def assert_close(
    ours: Tensor, theirs: Tensor, *, dtype: torch.dtype | None = None, size: float | None = None
) -> None:
    """Compare in float64, relative to ``size``, with the tolerance of ``dtype``.

    The dtype is that of ``ours`` and the size that of the largest value if not given.
    """
    assert ours.shape == theirs.shape, f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    if not ours.numel():
        return
    ours64, theirs64 = ours.detach().double(), theirs.detach().double()
    limit = RELATIVE[dtype or ours.dtype] * (size or theirs64.abs().max().item())
    gap = (ours64 - theirs64).abs().max().item()
    assert gap <= limit, f"{gap:.3g} apart, {limit:.3g} allowed for {dtype or ours.dtype}"
