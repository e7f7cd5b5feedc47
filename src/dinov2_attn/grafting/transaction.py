"""One operation: the classes of a target, recognised, grafted and proved, or left alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from dinov2_attn.backbone import contract, proof
from dinov2_attn.backbone.structure import BLOCK_CHILDREN, Part, in_order
from dinov2_attn.errors import Dinov2AttnError, IncompatibleUpstreamError, PatchedOnTopError
from dinov2_attn.grafting.models import (
    METHODS,
    graft_forward,
    graft_forward_features,
    graft_prepare_tokens,
)
from dinov2_attn.grafting.modules import graft_attention, graft_block
from dinov2_attn.grafting.registry import Ledger
from dinov2_attn.history.identify import warn_of_drift
from dinov2_attn.kernels.xformers_fallback import graft_kernel
from dinov2_attn.kernels.xformers_flags import KERNEL, home_of_kernel


def operate(
    ledger: Ledger, target: Hashable, classes: Iterable[tuple[type, Part]], *, fallback: bool
) -> None:
    """Graft ``classes`` for ``target``: all of them and proved, or nothing of this target.

    Classes that are grafted already are kept for this target too. Parts come in the
    order in which they build on each other, so that each can be proved on proved ones.
    With ``fallback`` the kernels of xFormers that they call are grafted as well.
    Upstream's code that is new here and holds is warned of, once, when it is grafted.
    """
    before = list(ledger)
    try:
        found = in_order(classes)
        options = _made_of(found)
        with proof.laboratory():
            for cls, part in found:
                _graft(ledger, target, cls, part, options.get(part, {}))
        if fallback:
            _graft_kernels(ledger, target, [cls for cls, _ in found])
        else:
            ledger.release(target, only_kernels=True)
        if any(graft not in before for graft in ledger):
            warn_of_drift(ledger, target, [cls for cls, _ in found])
    except BaseException:
        ledger.roll_back(before)
        with suppress(PatchedOnTopError):  # what was proved before may stay under somebody's patch
            ledger.release(target)
        raise


def _graft(
    ledger: Ledger, target: Hashable, cls: type, part: Part, options: dict[str, Any]
) -> None:
    try:
        _STEPS[part](ledger, target, cls, part, options)
    except Dinov2AttnError:
        raise
    except Exception as error:  # foreign code: whatever it raises, it is not what we know
        raise IncompatibleUpstreamError(
            f"{contract.name_of(cls)} to be built and run small, as upstream's class can be",
            f"{type(error).__name__}: {error}",
            "This class is not supported, so nothing was grafted.",
        ) from error


def _made_of(classes: list[tuple[type, Part]]) -> dict[Part, dict[str, Any]]:
    """Say what blocks and models are to be built of: the first, most basic classes at hand.

    The defaults of a class may be upstream's and not grafted, where a user's model has an
    attention or a block of its own.
    """
    first: dict[Part, type] = {}
    for cls, part in classes:
        first.setdefault(part, cls)
    options: dict[Part, dict[str, Any]] = {}
    if Part.ATTENTION in first:
        options[Part.BLOCK] = {"attn_class": first[Part.ATTENTION]}
        if Part.BLOCK in first:
            block = partial(first[Part.BLOCK], **options[Part.BLOCK])
            options[Part.TRANSFORMER] = {"block_fn": block}
    return options


def _graft_attention(
    ledger: Ledger, target: Hashable, cls: type, part: Part, _: dict[str, Any]
) -> None:
    if "forward" not in vars(cls) or ledger.keep(cls, "forward", target):
        return
    contract.check_arguments(cls, part, "forward")
    original = vars(cls)["forward"]
    kernel = proof.measure_kernel(cls, original)
    grafted = graft_attention(original, kernel)
    ledger.set(cls, "forward", grafted, target)
    proof.prove_attention(cls, original, grafted, kernel)


def _graft_block(
    ledger: Ledger, target: Hashable, cls: type, part: Part, options: dict[str, Any]
) -> None:
    if "forward" not in vars(cls) or ledger.keep(cls, "forward", target):
        return
    contract.check_arguments(cls, part, "forward")
    original = vars(cls)["forward"]
    grafted = graft_block(original, part)
    ledger.set(cls, "forward", grafted, target)
    proof.prove_block(cls, original, grafted, BLOCK_CHILDREN[part][1], options)


def _graft_transformer(
    ledger: Ledger, target: Hashable, cls: type, part: Part, options: dict[str, Any]
) -> None:
    missing = [name for name in (*_FORWARDS, *METHODS) if not ledger.keep(cls, name, target)]
    if not missing:
        return
    contract.check_methods(cls, {name: METHODS[name] for name in missing if name in METHODS})
    for name in missing:
        if name in vars(cls) and name in _FORWARDS:
            contract.check_arguments(cls, part, name)
            ledger.set(cls, name, _FORWARDS[name](vars(cls)[name]), target)
        elif name in METHODS and not hasattr(cls, name):  # a base class may bring it already
            ledger.set(cls, name, METHODS[name], target)
    proof.prove_transformer(cls, options)


def _graft_kernels(ledger: Ledger, target: Hashable, classes: list[type]) -> None:
    for cls in classes:
        home = home_of_kernel(vars(cls).get("forward", cls))
        if home is not None and not ledger.keep(home, KERNEL, target):
            ledger.set(home, KERNEL, graft_kernel(home[KERNEL]), target)


# What calls another comes first, and goes last: upstream's own forward would pass a question on to
# forward_features and drop its answer.
_FORWARDS = {
    "forward": graft_forward,
    "forward_features": graft_forward_features,
    "prepare_tokens_with_masks": graft_prepare_tokens,
}

_Step = Callable[[Ledger, Hashable, type, Part, dict[str, Any]], None]
_STEPS: dict[Part, _Step] = {
    Part.ATTENTION: _graft_attention,
    Part.BLOCK: _graft_block,
    Part.CAUSAL_BLOCK: _graft_block,
    Part.TRANSFORMER: _graft_transformer,
}
