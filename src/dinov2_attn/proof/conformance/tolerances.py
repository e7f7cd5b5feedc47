"""Two kinds of equality, for this suite and for the tests of the package.

``assert_same_bits``
    For values of the same operations on the same numbers (the same calls, shapes, strides and
    batches), and for copies. The result does not depend on processor, library or threads.

``assert_close``
    For the same attention computed in another way: a slice of a product and the product of a
    slice, one image and a batch, tiles and the whole. Another order of summation rounds
    differently, by an amount that depends on the processor. ``RELATIVE`` holds the tolerance of
    each dtype. It is relative to the largest value, so it does not depend on the data.

Both take tensors, NumPy arrays, and lists, tuples and dicts of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

RELATIVE = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def assert_close(
    ours: Any,
    theirs: Any,
    what: str = "the same values",
    *,
    dtype: torch.dtype | None = None,
    size: float | None = None,
    within: float | None = None,
) -> None:
    """Raise AssertionError, naming ``what``, if ``ours`` is not ``theirs`` within the tolerance.

    NaN is a failure, and so is infinity: neither is close to anything.

    Args:
        ours: What was computed.
        theirs: What it should be.
        what: What the message names.
        dtype: What the tolerance is that of; by default the dtype of ``ours``.
        size: What the tolerance is relative to; by default the largest value of ``theirs``.
        within: An absolute limit instead, where something other than a dtype rounds: a file
            of 8 bits, a figure of two digits.

    """
    __tracebackhide__ = True
    for name, a, b in _pairs(what, ours, theirs):
        left, right = torch.as_tensor(a), torch.as_tensor(b)
        assert_shape(name, left, tuple(right.shape))
        if not left.numel():
            continue
        kind = dtype or left.dtype
        left, right = left.detach().double(), right.detach().double()
        limit = within
        if limit is None:
            limit = RELATIVE[kind] * (right.abs().max().item() if size is None else size)
        gap = (left - right).abs().max().item()
        if not gap <= limit < math.inf:  # also false of NaN
            raise AssertionError(
                f"expected {name} within {limit:.2g} ({kind}); found {gap:.2g} apart"
            )


def are_close(ours: Any, theirs: Any) -> bool:
    """Return whether ``assert_close`` passes."""
    try:
        assert_close(ours, theirs)
    except AssertionError:
        return False
    return True


def assert_same_bits(ours: Any, theirs: Any, what: str = "the same values") -> None:
    """Raise AssertionError, naming ``what``, unless both are the same, bit for bit.

    So ``-0.0`` is not ``0.0``, and NaN is NaN. Dtypes and shapes count too.
    """
    __tracebackhide__ = True
    for name, a, b in _pairs(what, ours, theirs):
        if not _bits(a, b):
            raise AssertionError(f"expected {name}, bit for bit; found {_difference(a, b)}")


def same_bits(ours: Any, theirs: Any) -> bool:
    """Return whether ``assert_same_bits`` passes."""
    return all(_bits(a, b) for _, a, b in _pairs("both", ours, theirs))


def assert_shape(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise AssertionError, naming ``what``, if ``tensor`` does not have ``shape``."""
    __tracebackhide__ = True
    if tuple(tensor.shape) != shape:
        raise AssertionError(f"expected {what} of shape {shape}; found {tuple(tensor.shape)}")


def _pairs(what: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Walk over both alike. Raise AssertionError if there is nothing, or not as much, in one."""
    __tracebackhide__ = True
    if isinstance(ours, Mapping):
        if list(ours) != list(theirs):
            raise AssertionError(f"expected {what}: {list(theirs)}; found {list(ours)}")
        ours, theirs, names = [*ours.values()], [*theirs.values()], [*ours]
    elif isinstance(ours, list | tuple) or isinstance(theirs, list | tuple):
        ours, theirs = list(ours), list(theirs)
        names = list(range(len(ours)))
    else:
        yield what, ours, theirs
        return
    if len(ours) != len(theirs) or not ours:
        raise AssertionError(f"expected {what}: {len(theirs)} (not 0); found {len(ours)}")
    for name, a, b in zip(names, ours, theirs, strict=True):
        yield from _pairs(f"{what} [{name}]", a, b)


def _bits(a: Any, b: Any) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not isinstance(a, Tensor):  # a NumPy array
        return bool(a.tobytes() == b.tobytes())
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    # A copy: what has one element counts as contiguous with any stride.
    flat = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def _difference(a: Any, b: Any) -> str:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
    left, right = (torch.as_tensor(x).detach().double() for x in (a, b))
    return f"{(left - right).abs().max().item():.2g} between them"
