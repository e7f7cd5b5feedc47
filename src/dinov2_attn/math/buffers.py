"""Memory for large results, without a page fault for every 4096 bytes of it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from mmap import PAGESIZE
from typing import Any, cast

import torch
from torch import Tensor

# From NumPy, which does the same for its large arrays (``PyDataMem_UserNEW``).
_LARGE = 2**22
_MADV_HUGEPAGE = 14


# The type of ``new_result`` and of each ``allocate``.
NewResult = Callable[[Tensor, tuple[int, ...]], Tensor]


def new_result(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return an uninitialised tensor of ``shape``, dtype and device as those of ``like``.

    On Linux, a large one on the CPU asks for huge pages. The first write to a fresh page is a page
    fault. For the weights of one layer, 45 MB, these take as long as the product. It is a hint,
    and changes no result.
    """
    result = like.new_empty(shape)
    if _is_large(result) and (advise := _of_libc("madvise")) is not None:
        start, end = _whole_pages(result)
        advise(start, end - start, _MADV_HUGEPAGE)
    return result


def is_fresh(tensor: Tensor) -> bool:
    """Return whether the pages of a large tensor are not resident yet.

    True wherever that is unknown: on other systems than Linux, and on devices.
    """
    if not _is_large(tensor) or (look := _of_libc("mincore")) is None:
        return True
    start, end = _whole_pages(tensor)
    resident = ctypes.c_ubyte()
    middle = start + (end - start) // 2 // PAGESIZE * PAGESIZE
    pages = (start, middle, end - PAGESIZE)
    return not all(
        look(page, PAGESIZE, ctypes.byref(resident)) == 0 and resident.value & 1 for page in pages
    )


def _is_large(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() >= _LARGE


def _whole_pages(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses where the pages that are the tensor's alone start and end."""
    end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    return -(-tensor.data_ptr() // PAGESIZE) * PAGESIZE, end // PAGESIZE * PAGESIZE


class ReusableBuffer:
    """Memory for one large result after another, reused if the one before is no longer held.

    Resident pages cost no page faults. A result that is still held when the next is allocated, by
    a view of it too, keeps its memory.
    """

    def __init__(self) -> None:
        self._lent: dict[int, _Lent] = {}

    def allocate(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return an uninitialised tensor, as ``new_result`` does."""
        size = torch.Size(shape).numel() * like.element_size()
        if like.device.type != "cpu" or size < _LARGE:
            return new_result(like, shape)
        before = self._lent.get(size)
        if before is not None and before.is_free():
            return before.tensor(like, shape)
        # Sizes that no longer come are freed. Those of one list are all held at this moment.
        self._lent = {size: lent for size, lent in self._lent.items() if not lent.is_free()}
        self._lent[size] = _Lent(new_result(like, shape))
        return self._lent[size].tensor(like, shape)


class Preallocated:
    """Memory for as many results as there are layers, allocated with the first.

    Small results between the large ones of a layer would fragment the memory, so that the large
    ones of the next layer do not fit.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._spare: dict[object, list[Tensor]] = {}

    def allocate(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return an uninitialised tensor, as ``new_result`` does."""
        spare = self._spare.setdefault((shape, like.dtype, like.device), [])
        if not spare:
            spare += [new_result(like, shape) for _ in range(self._layers)]
        return spare.pop()


class _Lent:
    """The memory of a tensor, as an object that every tensor in it refers to."""

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
        # What a call itself adds differs between versions of Python, so only this function counts.
        return sys.getrefcount(self._memory)

    def tensor(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.frombuffer(self._memory, dtype=like.dtype).view(shape)


@cache
def _of_libc(name: str) -> Any:
    """Return Linux's ``madvise`` or ``mincore``; ``None`` elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        third = ctypes.c_int if name == "madvise" else ctypes.c_void_p
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, third]
    return function
