"""Finding attention modules, blocks and transformers by their structure.

Names and places differ between upstream and vendored copies. What the classes are made of does
not. A class found here is only a candidate: the contract and the proof decide.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from enum import Enum
from types import ModuleType

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
