"""One operation: the classes of a target, recognised, grafted and proved, or left alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from dinov2_attn.backbone import contract, proof
from dinov2_attn.backbone.structure import BLOCK_CHILDREN, Role, in_order
from dinov2_attn.errors import Dinov2AttnError, IncompatibleUpstreamError, PatchedOnTopError
from dinov2_attn.grafting.models import (
    METHODS,
    graft_forward,
    graft_forward_features,
    graft_prepare_tokens,
)
from dinov2_attn.grafting.modules import graft_attention, graft_block
from dinov2_attn.grafting.registry import GraftRegistry
from dinov2_attn.history.identify import warn_of_drift
from dinov2_attn.kernels.xformers import KERNEL, graft_kernel, kernel_namespace


def graft_classes(
    registry: GraftRegistry,
    target: Hashable,
    classes: Iterable[tuple[type, Role]],
    *,
    fallback: bool,
) -> None:
    """Graft ``classes`` for ``target``: all of them and proved, or nothing of this target.

    Classes that are grafted already are kept for this target too. Parts come in the
    order in which they build on each other, so that each can be proved on proved ones.
    With ``fallback`` the kernels of xFormers that they call are grafted as well.
    Upstream's code that is new here and holds is warned of, once, when it is grafted.
    """
    before = list(registry)
    try:
        found = in_order(classes)
        options = constructor_options(found)
        with proof.sandbox():
            for cls, role in found:
                _graft(registry, target, cls, role, options.get(role, {}))
        if fallback:
            _graft_kernels(registry, target, [cls for cls, _ in found])
        else:
            registry.release(target, only_kernels=True)
        if any(graft not in before for graft in registry):
            warn_of_drift(registry, target, [cls for cls, _ in found])
    except BaseException:
        registry.roll_back(before)
        with suppress(PatchedOnTopError):  # what was proved before may stay under somebody's patch
            registry.release(target)
        raise


def _graft(
    registry: GraftRegistry, target: Hashable, cls: type, role: Role, options: dict[str, Any]
) -> None:
    try:
        _GRAFTERS[role](registry, target, cls, role, options)
    except Dinov2AttnError:
        raise
    except Exception as error:  # foreign code: whatever it raises, it is not what we know
        raise IncompatibleUpstreamError(
            f"{contract.name_of(cls)} to be built and run small, as upstream's class can be",
            f"{type(error).__name__}: {error}",
            "This class is not supported, so nothing was grafted.",
        ) from error


def constructor_options(classes: list[tuple[type, Role]]) -> dict[Role, dict[str, Any]]:
    """Say what blocks and models are to be built of: the first, most basic classes at hand.

    The defaults of a class may be upstream's and not grafted, where a user's model has an
    attention or a block of its own.
    """
    first: dict[Role, type] = {}
    for cls, role in classes:
        first.setdefault(role, cls)
    options: dict[Role, dict[str, Any]] = {}
    if Role.ATTENTION in first:
        options[Role.BLOCK] = {"attn_class": first[Role.ATTENTION]}
        if Role.BLOCK in first:
            block = partial(first[Role.BLOCK], **options[Role.BLOCK])
            options[Role.TRANSFORMER] = {"block_fn": block}
    return options


def _graft_attention(
    registry: GraftRegistry, target: Hashable, cls: type, role: Role, _: dict[str, Any]
) -> None:
    if "forward" not in vars(cls) or registry.claim(cls, "forward", target):
        return
    contract.check_arguments(cls, role, "forward")
    original = vars(cls)["forward"]
    kernel = proof.measure_kernel(cls, original)
    grafted = graft_attention(original, kernel)
    registry.set(cls, "forward", grafted, target)
    proof.prove_attention(cls, original, grafted, kernel)


def _graft_block(
    registry: GraftRegistry, target: Hashable, cls: type, role: Role, options: dict[str, Any]
) -> None:
    if "forward" not in vars(cls) or registry.claim(cls, "forward", target):
        return
    contract.check_arguments(cls, role, "forward")
    original = vars(cls)["forward"]
    grafted = graft_block(original, role)
    registry.set(cls, "forward", grafted, target)
    proof.prove_block(cls, original, grafted, BLOCK_CHILDREN[role][1], options)


def _graft_transformer(
    registry: GraftRegistry, target: Hashable, cls: type, role: Role, options: dict[str, Any]
) -> None:
    missing = [name for name in (*_FORWARDS, *METHODS) if not registry.claim(cls, name, target)]
    if not missing:
        return
    contract.check_methods(cls, {name: METHODS[name] for name in missing if name in METHODS})
    for name in missing:
        if name in vars(cls) and name in _FORWARDS:
            contract.check_arguments(cls, role, name)
            registry.set(cls, name, _FORWARDS[name](vars(cls)[name]), target)
        elif name in METHODS and not hasattr(cls, name):  # a base class may bring it already
            registry.set(cls, name, METHODS[name], target)
    proof.prove_transformer(cls, options)


def _graft_kernels(registry: GraftRegistry, target: Hashable, classes: list[type]) -> None:
    for cls in classes:
        home = kernel_namespace(vars(cls).get("forward", cls))
        if home is not None and not registry.claim(home, KERNEL, target):
            registry.set(home, KERNEL, graft_kernel(home[KERNEL]), target)


# What calls another comes first, and goes last: upstream's own forward would pass a question on to
# forward_features and drop its answer.
_FORWARDS = {
    "forward": graft_forward,
    "forward_features": graft_forward_features,
    "prepare_tokens_with_masks": graft_prepare_tokens,
}

_Step = Callable[[GraftRegistry, Hashable, type, Role, dict[str, Any]], None]
_GRAFTERS: dict[Role, _Step] = {
    Role.ATTENTION: _graft_attention,
    Role.BLOCK: _graft_block,
    Role.CAUSAL_BLOCK: _graft_block,
    Role.TRANSFORMER: _graft_transformer,
}
