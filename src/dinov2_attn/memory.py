"""Fresh memory for a large result, without a page fault for every 4096 bytes of it."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

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


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
