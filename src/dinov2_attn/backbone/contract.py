"""The names, arguments and attributes of upstream's methods that the grafts rely on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dinov2_attn.backbone.structure import Role, name_of
from dinov2_attn.errors import IncompatibleUpstreamError

# The arguments that the grafts can handle. A position, a rotary table or anything new would change
# the weights in an unknown way.
_ARGUMENTS = {
    Role.ATTENTION: {"x", "attn_bias", "is_causal"},
    Role.BLOCK: {"x", "x_or_x_list"},
    Role.CAUSAL_BLOCK: {"x"},
}

# What `Attention.forward` reads in upstream and in all forks with plain attention. A q_norm, a rope
# or a mask would act between projection and kernel.
_READS = {"qkv", "proj", "num_heads", "scale", "attn_drop", "proj_drop", "dim", "head_dim"}

# What PyTorch itself keeps on the instance of any module.
_EVERY_MODULE = frozenset(vars(nn.Module()))

# The argument that a graft adds. Code that has it already keeps its own.
_OURS = {
    Role.ATTENTION: "return_attn",
    Role.BLOCK: "return_attention",
    Role.CAUSAL_BLOCK: "return_attention",
    Role.TRANSFORMER: "return_attention",
}


def keyword_of(role: Role) -> str:
    """Return the argument that a graft adds to classes of ``role``."""
    return _OURS[role]


def check_arguments(cls: type, role: Role, method: str) -> None:
    """Raise ``IncompatibleUpstreamError`` unless ``cls.method`` takes what grafts pass on."""
    names = argument_names(vars(cls)[method])
    if _OURS[role] in names:
        raise _has_its_own(cls, f"{method} with an argument {_OURS[role]}")
    allowed = _ARGUMENTS.get(role)
    if allowed is not None and (unknown := [name for name in names if name not in allowed]):
        raise IncompatibleUpstreamError(
            f"{name_of(cls)}.{method} to take no more than {', '.join(sorted(allowed))}",
            f"the argument {', '.join(unknown)}",
            "What it does to the attention is unknown, so its weights are taken at its kernel.",
        )


def check_methods(cls: type, ours: Mapping[str, object]) -> None:
    """Raise ``IncompatibleUpstreamError`` if ``cls`` has a method that ``ours`` would hide."""
    if taken := [name for name, method in ours.items() if getattr(cls, name, method) is not method]:
        raise _has_its_own(cls, f"{', '.join(taken)} already there")


def check_reads(module: nn.Module, run: Callable[[], object]) -> None:
    """Raise ``IncompatibleUpstreamError`` unless ``run`` reads only what plain attention needs.

    The attributes are observed as they are read, in any helper. The source may be missing, or
    have dead code.
    """
    cls = type(module)
    if unknown := sorted(_reads(module, run) - _READS):
        raise IncompatibleUpstreamError(
            f"{name_of(cls)} to compute softmax(q kᵀ · scale) of its "
            f"own projection, reading {', '.join(sorted(_READS))} only",
            f"that its forward also reads {', '.join(unknown)}",
            "There may be a norm, a rotation or a mask between projection and kernel, "
            "so its weights are taken at its kernel.",
        )


def argument_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments after ``self``, in order, ``*`` and ``**`` left out."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [p.name for p in parameters if p.kind not in variadic]


def options_of(cls: type) -> set[str]:
    """Return the arguments of ``cls(...)``, with those that ``**kwargs`` passes to its bases."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            names.update(parameters)
            if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
                break
    return names


def _has_its_own(cls: type, found: str) -> IncompatibleUpstreamError:
    return IncompatibleUpstreamError(
        f"{name_of(cls)} as upstream wrote it",
        found,
        "This copy has its own, which stays. record(model) gives the weights that its kernel used.",
    )


def _reads(module: nn.Module, run: Callable[[], object]) -> set[str]:
    """Return the names of ``module`` that ``run`` reads, without those of every ``nn.Module``."""
    seen: set[str] = set()
    cls = type(module)

    def spy(self: nn.Module, name: str) -> object:
        seen.add(name)
        return cls.__getattribute__(self, name)

    module.__class__ = type(cls.__name__, (cls,), {"__getattribute__": spy})
    try:
        run()
    finally:
        module.__class__ = cls
    return {name for name in seen if not hasattr(nn.Module, name)} - _EVERY_MODULE
