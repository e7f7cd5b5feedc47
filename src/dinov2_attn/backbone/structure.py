"""Finding attention modules, blocks, transformers, and where images enter, by structure.

Names and places differ between upstream and vendored copies. What the classes are made of does
not. A class found here is only a candidate: the contract and the proof decide.

In any other model a module counts as attention if the code of its class names a kernel, in its own
methods or in functions of its package that these call. Only the innermost such modules count.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import cached_property
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from dinov2_attn._compat import submodules


class Role(Enum):
    """The kinds of class that are grafted. Each builds on those before it."""

    ATTENTION = "attention module"
    BLOCK = "transformer block"
    CAUSAL_BLOCK = "causal transformer block"
    TRANSFORMER = "vision transformer"


REQUIRED_ATTRIBUTES = {
    Role.ATTENTION: {"qkv", "proj", "num_heads"},
    Role.BLOCK: {"norm1", "attn"},
    Role.CAUSAL_BLOCK: {"attention_norm", "attention", "is_causal"},
    Role.TRANSFORMER: {"blocks", "prepare_tokens_with_masks"},
}

# The norm before the attention and the attention itself, by upstream's names.
BLOCK_CHILDREN = {
    Role.BLOCK: ("norm1", "attn"),
    Role.CAUSAL_BLOCK: ("attention_norm", "attention"),
}

# The methods that decide what attention a class computes, and on what.
_CODE = frozenset({"forward", "forward_features", "prepare_tokens_with_masks"})


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
    {"wq", "wk", "wv"},
    {"Wq", "Wk", "Wv"},
    {"q_lin", "k_lin", "v_lin"},
    {"query_proj", "key_proj", "value_proj"},
    {"to_qkv"},
    {"Wqkv"},
)

# Functions called by functions called by a method: eager code of transformers is one of these.
_DEPTH = 3


def role_of_class(cls: type) -> Role | None:
    """Return the role of ``cls``, from the names in its ``__init__`` and body."""
    names = {name for base in cls.__mro__ for name in (*vars(base), *_names_in_init(base))}
    return _matching(names)


def role_of_module(module: nn.Module) -> Role | None:
    """Return the role of a live ``module``, from its own attributes.

    A wrapper that reads them from the module inside by ``__getattr__`` has none.
    """
    return next(
        (role for role, needed in REQUIRED_ATTRIBUTES.items() if _has_itself(module, needed)), None
    )


def classes_in(module: ModuleType) -> Iterator[tuple[type, Role]]:
    """Yield the classes with a role that ``module`` uses, defined there or in its package.

    Imported classes count: after a reload of one module, others still build models of the older
    classes.
    """
    package = _package(module.__name__)
    for cls in vars(module).copy().values():
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            for base in _own_bases(cls):
                if _package(base.__module__) == package and (role := role_of_class(base)):
                    yield base, role


def classes_behind(model: nn.Module) -> Iterator[tuple[type, Role]]:
    """Yield the classes with a role whose code a live ``model`` runs.

    In a larger model only its vision transformers count, and other attention is left alone. Base
    classes are included, because upstream's methods call those of their bases.
    """
    transformers = [m for m in model.modules() if role_of_module(m) is Role.TRANSFORMER]
    found: dict[type, Role] = {}
    for root in transformers or [model]:
        for module in root.modules():
            if (role := role_of_module(module)) is not None:
                found.update(dict.fromkeys(_own_bases(type(module)), role))
    yield from in_order(found.items())


def running_attention(model: nn.Module) -> set[type]:
    """Return the classes whose ``forward`` the attention modules of ``model`` run."""
    return {
        next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
        for module in model.modules()
        if role_of_module(module) is Role.ATTENTION
    }


def name_of(cls: type) -> str:
    """Return the full name of a class, as messages give it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def in_order(classes: Iterable[tuple[type, Role]]) -> list[tuple[type, Role]]:
    """Return the classes sorted by role, otherwise in their order."""
    return sorted(classes, key=lambda item: list(Role).index(item[1]))


def _own_bases(cls: type) -> list[type]:
    """Return ``cls`` and its bases that define such a method, bases first, without PyTorch's."""
    return [
        base
        for base in reversed(cls.__mro__)
        if not _CODE.isdisjoint(vars(base)) and _package(base.__module__) != "torch"
    ]


def _package(module: str) -> str:
    return module.partition(".")[0]


def _has_itself(module: nn.Module, names: set[str]) -> bool:
    held = (vars(module), submodules(module), *map(vars, type(module).__mro__))
    return all(any(name in some for some in held) for name in names)


def _matching(names: set[str]) -> Role | None:
    return next((role for role, needed in REQUIRED_ATTRIBUTES.items() if needed <= names), None)


def _names_in_init(cls: type) -> tuple[str, ...]:
    if "__init__" not in vars(cls):
        return ()
    code = getattr(inspect.unwrap(vars(cls)["__init__"]), "__code__", None)
    return code.co_names if code is not None else ()


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``model.named_modules()`` yields, except modules without any inside.

    Those are most of all modules, and every recording begins with such a walk.
    """
    seen: set[nn.Module] = set()
    left: list[tuple[str, nn.Module]] = [("", model)]
    while left:
        path, module = left.pop()
        if module not in seen:
            seen.add(module)
            yield path, module
            before = f"{path}." if path else ""
            left += [
                (before + name, child)
                for name, child in reversed([*submodules(module).items()])
                if child is not None and submodules(child)
            ]


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules of ``model`` by their paths, in the order of definition."""
    found = {name: m for name, m in walk(model) if may_attend(m)}
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
    names = submodules(module).keys()
    return any(needed <= names for needed in _PROJECTIONS)


def image_entrances(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold the convolution which makes patches of an image.

    These are the modules whose own child is a convolution with a stride as large as its kernel.
    """
    return [
        module
        for _, module in walk(model)
        if any(map(cuts_patches, submodules(module).values())) and not _is_of_torch(module)
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
    found = inspect.unwrap(attribute) if callable(attribute) else None
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
        # Code that was made by exec may be of no module.
        if _package(helper.__module__ or "") == _package(known.get("__name__", "")):
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


def cuts_patches(child: nn.Module | None) -> bool:
    """Return whether ``child`` is a convolution with a stride as large as its kernel."""
    if not isinstance(child, nn.Conv2d | nn.Conv3d):
        return False
    kernel, stride = child.kernel_size, child.stride
    return kernel == stride and max(kernel) > 1


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")
