"""Memory for large results, used again when no tensor lives in it any more.

The first write to a fresh page of memory is a page fault. For the weights of one layer, 45 MB, page
faults take as long as the product. So on a CPU a large result lies in a block that is kept here
after its last tensor is gone. The next result of about its size is written there.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import sys
from collections import deque
from collections.abc import Callable
from functools import cache
from mmap import PAGESIZE
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor

# Smaller results are left to the allocator of PyTorch.
_LARGE = 2**18

# Huge pages are requested from here on. NumPy does the same (``PyDataMem_UserNEW``).
_HUGE = 2**22
_MADV_FREE, _MADV_HUGEPAGE = 8, 14

# The most bytes that are kept for later results, and their share of the machine's memory.
_MOST_KEPT, _SHARE_KEPT = 2**31, 8


# The type of ``new_result``.
NewResult = Callable[[Tensor, tuple[int, ...]], Tensor]


def new_result(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised tensor of ``shape``, on the device of ``like``.

    A large one on the CPU takes memory that an earlier one has left, else fresh memory. On Linux
    fresh memory asks for huge pages. It is a hint, and changes no result.

    Args:
        like: A tensor of the same device.
        shape: The shape.
        dtype: The dtype, that of ``like`` if None.

    """
    dtype = like.dtype if dtype is None else dtype
    count = math.prod(shape)
    size = count * torch.finfo(dtype).bits // 8
    if size < _LARGE or like.device.type != "cpu":
        return like.new_empty(shape, dtype=dtype)
    flat = torch.frombuffer(_KEPT.lend(size), dtype=dtype, count=count)
    # Not flat.view(shape): a result is no view of another tensor.
    return flat.new_empty(0).set_(flat.untyped_storage()).resize_(shape)


def release_memory() -> int:
    """Give the memory back that is kept for later results on the CPU.

    A large result lies in memory that is kept after the result is gone. So a loop over images
    writes to the same memory again, which saves most of its time in the operating system. At most
    2 GiB are kept, and at most an eighth of the machine's memory. Memory of tensors that something
    refers to, by a view or an array too, is not touched.

    Like ``torch.cuda.empty_cache()``, this is never necessary.

    Returns:
        The number of bytes that were kept.

    """
    return _KEPT.drop()


def is_fresh(tensor: Tensor) -> bool:
    """Return whether the pages of a large tensor are not resident yet.

    True wherever that is unknown: on other systems than Linux, and on devices.
    """
    size = tensor.numel() * tensor.element_size()
    look = _of_libc("mincore")
    if size < _LARGE or tensor.device.type != "cpu" or look is None:
        return True
    start, end = _whole_pages(tensor.data_ptr(), size)
    resident = ctypes.c_ubyte()
    middle = start + (end - start) // 2 // PAGESIZE * PAGESIZE
    pages = (start, middle, end - PAGESIZE)
    return not all(
        look(page, PAGESIZE, ctypes.byref(resident)) == 0 and resident.value & 1 for page in pages
    )


def _whole_pages(address: int, size: int) -> tuple[int, int]:
    """Return the addresses where the pages start and end that are within ``size`` bytes."""
    return -(-address // PAGESIZE) * PAGESIZE, (address + size) // PAGESIZE * PAGESIZE


class _Block:
    """Some memory: that of a tensor which nothing else refers to."""

    def __init__(self, size: int) -> None:
        self._owner = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.size = size
        if size >= _HUGE:
            self._advise(_MADV_HUGEPAGE)

    def set_aside(self) -> None:
        """Let the operating system take the memory if it has too little. Until then it stays.

        For a small block that takes as long as a layer's weights.
        """
        if self.size >= _HUGE:
            self._advise(_MADV_FREE)

    def lend(self) -> Any:
        """Return the memory as an object, to which every tensor in it will refer."""
        return cast(Any, (ctypes.c_byte * self.size).from_address(self._owner.data_ptr()))

    def _advise(self, advice: int) -> None:
        if (advise := _of_libc("madvise")) is not None:
            start, end = _whole_pages(self._owner.data_ptr(), self.size)
            advise(start, end - start, advice)


class _Lent(ref[Any]):
    """A reference to lent memory, with the block that it belongs to."""

    __slots__ = ("block",)
    block: _Block


class _Kept:
    """Blocks that no tensor lives in, by their size. Each is lent to one result at a time.

    A lent block comes back when PyTorch frees the storage in it. That may be in any thread, and
    between any two lines here. So there is no lock: each line that changes something is atomic.
    """

    def __init__(self) -> None:
        self._free: dict[int, deque[_Block]] = {}
        self._lent: dict[int, _Lent] = {}
        self.is_open = True

    def lend(self, size: int) -> Any:
        """Return memory of ``size`` bytes or a few more."""
        size = _rounded(size)
        try:
            block = self._free[size].pop()
        except LookupError:
            block = _Block(size)
        memory = block.lend()
        lent = _Lent(memory, self._came_back)
        lent.block = block
        self._lent[id(lent)] = lent
        return memory

    def bytes(self) -> int:
        """Return how many bytes are kept."""
        return sum(size * len(blocks) for size, blocks in list(self._free.items()))

    def drop(self, most: int = 0, latest: int | None = None) -> int:
        """Drop blocks until no more than ``most`` bytes are kept, and return how many went.

        Those of the size ``latest`` are dropped after all others.
        """
        dropped = 0
        for size in sorted(self._free, key=lambda size: size == latest):
            while self.bytes() > most:
                try:
                    self._free[size].popleft()
                except IndexError:
                    break
                dropped += size
        return dropped

    def close(self) -> None:
        """Keep nothing from now on: Python ends, and takes modules apart."""
        self.is_open = False
        self._free = {}

    def _came_back(self, lent: Any) -> None:
        del self._lent[id(lent)]
        if self.is_open:
            block = lent.block
            block.set_aside()  # before it can be lent: pages that were written later would be lost
            self._free.setdefault(block.size, deque()).append(block)
            self.drop(most_kept(), latest=block.size)


def _rounded(size: int) -> int:
    """Return ``size`` rounded up by an eighth at most, so that similar sizes share memory."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


@cache
def most_kept() -> int:
    """Return the most bytes that are kept for later results."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return _MOST_KEPT
    return min(_MOST_KEPT, memory // _SHARE_KEPT)


_KEPT = _Kept()
atexit.register(_KEPT.close)


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
