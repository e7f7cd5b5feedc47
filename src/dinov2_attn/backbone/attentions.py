"""Finding the attention modules of any model, and the modules that images enter by.

A module counts as attention if the code of its class names a kernel, in its own methods or in
functions of its package that these call. Only the innermost such modules count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from inspect import unwrap
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from dinov2_attn._compat import submodules

KERNELS = frozenset(
    {"scaled_dot_product_attention", "memory_efficient_attention", "softmax", "Softmax"}
)

# The projections of an attention module, by the names that libraries use.
_PROJECTIONS = (
    {"qkv", "proj"},
    {"q", "k", "v"},
    {"query", "key", "value"},
    {"q_proj", "k_proj", "v_proj"},
    {"to_q", "to_k", "to_v"},
    {"to_qkv"},
    {"Wqkv"},
)

# Functions called by functions called by a method: eager code of transformers is one of these.
_DEPTH = 3


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules of ``model`` by their paths, in the order of definition."""
    found = {name: m for name, m in model.named_modules() if may_attend(m)}
    # Every path that leads to one of them.
    outer = {path for name in found for path in _above(name)}
    return {name: module for name, module in found.items() if name not in outer}


def may_attend(module: nn.Module) -> bool:
    """Return whether ``module`` can be attention: it is not PyTorch's, and names a kernel."""
    if not submodules(module) or _is_of_torch(module):
        return False
    return names_a_kernel(type(module)) or looks_like_attention(module)


def looks_like_attention(module: nn.Module) -> bool:
    """Return whether ``module`` has the projections of attention. Then it must call a kernel."""
    children = submodules(module)
    return any(needed <= children.keys() for needed in _PROJECTIONS)


def image_entrances(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold the convolution which makes patches of an image.

    These are the modules whose own child is a convolution with a stride as large as its kernel.
    """
    return [
        module
        for module in model.modules()
        if any(map(_cuts_patches, submodules(module).values())) and not _is_of_torch(module)
    ]


def names_a_kernel(cls: type) -> bool:
    """Return whether the code of ``cls``, or a function that it calls, names a kernel."""
    if cls not in _NAMING:
        _NAMING[cls] = _names_a_kernel(cls)
    return _NAMING[cls]


_NAMING: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def _names_a_kernel(cls: type) -> bool:
    own = (base for base in cls.__mro__ if base.__module__.partition(".")[0] != "torch")
    return any(
        _reaches_kernel(function, _DEPTH)
        for base in own
        for function in map(_function_in, vars(base).values())
        if function is not None
    )


def _function_in(attribute: object) -> FunctionType | None:
    if isinstance(attribute, staticmethod | classmethod):
        attribute = attribute.__func__
    if isinstance(attribute, property | cached_property):
        return None
    found = unwrap(attribute) if callable(attribute) else None
    return found if isinstance(found, FunctionType) else None


def _reaches_kernel(function: FunctionType, depth: int) -> bool:
    names = set(_names_in(function.__code__))
    if names & KERNELS:
        return True
    return depth > 0 and any(
        _reaches_kernel(helper, depth - 1) for helper in _helpers(function, names)
    )


def _helpers(function: FunctionType, names: set[str]) -> Iterator[FunctionType]:
    """Yield the functions of the same package that ``function`` names."""
    known: Mapping[str, Any] = function.__globals__
    for name in names & known.keys():
        helper = known[name]
        if not isinstance(helper, FunctionType) or helper is function:
            continue
        if _package(helper.__module__) == _package(known.get("__name__", "")):
            yield helper


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _above(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _cuts_patches(child: nn.Module | None) -> bool:
    if not isinstance(child, nn.Conv2d | nn.Conv3d):
        return False
    kernel, stride = child.kernel_size, child.stride
    return kernel == stride and max(kernel) > 1


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _package(module: str) -> str:
    return module.partition(".")[0]
