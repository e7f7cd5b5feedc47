"""One operation: the classes of a target, recognised, grafted and proved, or left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dinov2_attn.surgery.grafts import BLOCK_CHILDREN, graft_attention, graft_block
from dinov2_attn.surgery.ledger import Ledger
from dinov2_attn.surgery.transformer import METHODS, graft_forward, graft_forward_features
from dinov2_attn.upstream import contract, selfcheck
from dinov2_attn.upstream.anatomy import Part


def operate(ledger: Ledger, target: str, classes: Iterable[tuple[type, Part]]) -> None:
    """Graft ``classes`` for ``target``: all of them and proved, or nothing of this target.

    Classes that are grafted already are kept for this target too. Parts come in the
    order in which they build on each other, so that each can be proved on proved ones.
    """
    order = list(Part)
    try:
        with selfcheck.laboratory():
            for cls, part in sorted(classes, key=lambda item: order.index(item[1])):
                _STEPS[part](ledger, target, cls, part)
    except BaseException:
        ledger.release(target)
        raise


def _graft_attention(ledger: Ledger, target: str, cls: type, part: Part) -> None:
    if "forward" not in vars(cls) or ledger.keep(cls, target):
        return
    contract.check_arguments(cls, part, "forward")
    original = vars(cls)["forward"]
    kernel = selfcheck.measure_kernel(cls, original)
    grafted = graft_attention(original, kernel)
    ledger.set(cls, "forward", grafted, target)
    selfcheck.prove_attention(cls, original, grafted, kernel)


def _graft_block(ledger: Ledger, target: str, cls: type, part: Part) -> None:
    if "forward" not in vars(cls) or ledger.keep(cls, target):
        return
    contract.check_arguments(cls, part, "forward")
    original = vars(cls)["forward"]
    grafted = graft_block(original, part)
    ledger.set(cls, "forward", grafted, target)
    selfcheck.prove_block(cls, original, grafted, BLOCK_CHILDREN[part][1])


def _graft_transformer(ledger: Ledger, target: str, cls: type, part: Part) -> None:
    if ledger.keep(cls, target):
        return
    contract.check_methods(cls, METHODS)
    for name, graft in (("forward_features", graft_forward_features), ("forward", graft_forward)):
        if name in vars(cls):
            contract.check_arguments(cls, part, name)
            ledger.set(cls, name, graft(vars(cls)[name]), target)
    for name, method in METHODS.items():
        if getattr(cls, name, None) is not method:  # a base class may bring it already
            ledger.set(cls, name, method, target)
    selfcheck.prove_transformer(cls)


_STEPS: dict[Part, Callable[[Ledger, str, type, Part], None]] = {
    Part.ATTENTION: _graft_attention,
    Part.BLOCK: _graft_block,
    Part.CAUSAL_BLOCK: _graft_block,
    Part.TRANSFORMER: _graft_transformer,
}
