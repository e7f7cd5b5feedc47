"""What can be sent to processes that decode, and what tells two transforms apart."""

from __future__ import annotations

import hashlib
import re
import sys
from multiprocessing.reduction import ForkingPickler
from types import CodeType
from typing import Any


def can_be_sent(decoder: Any) -> bool:
    """Return whether a process that is started can be given ``decoder``."""
    if getattr(decoder, "stays", False):
        return False
    try:
        content = bytes(ForkingPickler.dumps(decoder))  # as it would be sent
    except Exception:  # whatever an object's own way of being pickled raises
        return False
    # A class of a notebook or of a prompt is found by its name here alone.
    return hasattr(sys.modules["__main__"], "__file__") or b"__main__" not in content


def fingerprint(*transforms: Any) -> str | None:
    """Return a text that tells ``transforms`` from others: their ``repr``, and code of functions.

    It is the same in every process.
    """
    told = [_told(transform) for transform in transforms if transform is not None]
    return "; ".join(told) or None


def _told(transform: Any) -> str:
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(transform))
    code = getattr(transform, "__code__", None)
    if isinstance(code, CodeType):
        text += f" {hashlib.sha256(repr(_parts(code)).encode()).hexdigest()[:12]}"
    return text


def _parts(code: CodeType) -> list[Any]:
    consts = [_parts(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return [code.co_code.hex(), code.co_names, consts]
