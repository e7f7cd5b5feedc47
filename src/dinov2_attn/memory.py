"""Memory for large results, without a page fault for every 4096 bytes of it."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

# From NumPy, which does the same for its large arrays (``PyDataMem_UserNEW``).
_LARGE = 2**22
_PAGE = 4096
_MADV_HUGEPAGE = 14


def new_result(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return an uninitialised tensor of ``shape``, dtype and device as those of ``like``.

    On Linux a large one on the CPU asks for huge pages. The first write to a fresh page
    stops in the kernel; for the weights of one layer, 45 MB, this takes as long as their
    product. It is a hint: where it is not taken, nothing is different.
    """
    result = like.new_empty(shape)
    size = result.numel() * result.element_size()
    if result.device.type == "cpu" and size >= _LARGE and (advise := _madvise()) is not None:
        start = -(-result.data_ptr() // _PAGE) * _PAGE
        end = (result.data_ptr() + size) // _PAGE * _PAGE
        advise(start, end - start, _MADV_HUGEPAGE)
    return result


class Scratch:
    """Memory for one large result after another, as long as nobody keeps the one before.

    What is written a second time costs no page faults at all. A result that is still held
    when the next is asked for, by a view of it too, is its holder's for good.
    """

    def __init__(self) -> None:
        self._lent: dict[int, _Lent] = {}

    def lend(self, like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, bool]:
        """Return what ``new_result`` does, and whether its memory has been written before."""
        size = torch.Size(shape).numel() * like.element_size()
        if like.device.type != "cpu" or size < _LARGE:
            return new_result(like, shape), False
        before = self._lent.get(size)
        if before is not None and before.is_free():
            return before.tensor(like, shape), True
        # Sizes that no longer come are let go; those of one list are all held at this moment.
        self._lent = {size: lent for size, lent in self._lent.items() if not lent.is_free()}
        self._lent[size] = _Lent(new_result(like, shape))
        return self._lent[size].tensor(like, shape), False


class SetAside:
    """Memory for as many results as there are layers, taken when the first is asked for.

    Small results that are kept, each allocated among a layer's large ones, would leave holes
    that the next layer's do not fit into.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._spare: dict[object, list[Tensor]] = {}

    def lend(self, like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, bool]:
        """Return what ``new_result`` does, and ``False``: its memory was never written."""
        spare = self._spare.setdefault((shape, like.dtype, like.device), [])
        if not spare:
            spare += [new_result(like, shape) for _ in range(self._layers)]
        return spare.pop(), False


class _Lent:
    """The memory of a tensor as an object that every tensor in it holds a reference to."""

    def __init__(self, owner: Tensor) -> None:
        size = owner.numel() * owner.element_size()
        memory = cast(Any, (ctypes.c_byte * size).from_address(owner.data_ptr()))
        memory.owner = owner  # lives as long as any tensor in it
        self._memory = memory
        del memory
        self._own_references = self._references()

    def is_free(self) -> bool:
        return self._references() == self._own_references

    def _references(self) -> int:
        # What a call itself adds differs between versions of Python: one place counts.
        return sys.getrefcount(self._memory)

    def tensor(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.frombuffer(self._memory, dtype=like.dtype).view(shape)


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
