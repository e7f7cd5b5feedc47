"""Upstream's switches between xFormers and PyTorch, read where upstream reads them.

Each of its modules sets ``XFORMERS_AVAILABLE`` at import, by itself: attention and block can
disagree (one import failed, somebody changed one), and ``XFORMERS_DISABLED`` in the
environment counts at import only, and only for revisions that know it.
"""

from __future__ import annotations

import inspect
import os
import sys
from types import FunctionType
from typing import Any, TypeGuard

from torch import nn

from dinov2_attn.typing import Forward

FLAG = "XFORMERS_AVAILABLE"
KERNEL = "memory_efficient_attention"


def is_gated(forward: Forward) -> TypeGuard[FunctionType]:
    """Say whether ``forward`` itself asks the flag."""
    return (
        isinstance(forward, FunctionType)
        and FLAG in forward.__code__.co_names
        and FLAG in forward.__globals__
    )


def flag_of(forward: Forward) -> bool:
    """Say whether ``forward`` would take the way through xFormers now.

    One without the flag does not know xFormers.
    """
    return is_gated(forward) and bool(forward.__globals__[FLAG])


def describe_flags(forward: FunctionType) -> str:
    """Say on what each flag stands in the modules beside that of ``forward``."""
    package = forward.__globals__["__name__"].rpartition(".")[0]
    flags = [
        f"{name}.{FLAG} is {vars(module)[FLAG]}"
        for name, module in sys.modules.copy().items()
        if name.startswith(f"{package}.") and FLAG in getattr(module, "__dict__", ())
    ]
    environment = "set" if "XFORMERS_DISABLED" in os.environ else "not set"
    return ", ".join([*sorted(flags), f"XFORMERS_DISABLED is {environment}"])


def runs_nested(block: nn.Module) -> bool:
    """Say whether upstream's own code would run ``block`` on a list, all tensors in one.

    Both flags must be up: the block nests, and its attention takes the nested bias.
    """
    attention = getattr(block, "attn", None)
    return _flag_of_module(block) and attention is not None and _flag_of_module(attention)


def kernel_namespace(forward: Forward) -> dict[str, Any] | None:
    """Return the globals in which ``forward`` finds xFormers' kernel, ``None`` if it does not."""
    forward = inspect.unwrap(forward)
    if is_gated(forward) and KERNEL in forward.__code__.co_names and KERNEL in forward.__globals__:
        return forward.__globals__
    return None


def _flag_of_module(module: nn.Module) -> bool:
    # The first that asks: a subclass may do its own thing first and call upstream's.
    forwards = (vars(base)["forward"] for base in type(module).__mro__ if "forward" in vars(base))
    for forward in map(inspect.unwrap, forwards):
        if is_gated(forward):
            return flag_of(forward)
    return False
