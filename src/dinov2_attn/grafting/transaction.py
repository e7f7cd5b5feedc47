"""Grafting the classes of one target: all of them, each proved, or nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

from dinov2_attn._compat import grad_mode_kept
from dinov2_attn.backbone import contract, proof
from dinov2_attn.backbone.structure import BLOCK_CHILDREN, Role, in_order, name_of, names_a_kernel
from dinov2_attn.errors import (
    Dinov2AttnError,
    IncompatibleUpstreamError,
    PatchedOnTopError,
    UnfaithfulError,
    in_one_line,
)
from dinov2_attn.grafting.channel import graft_captured
from dinov2_attn.grafting.models import (
    METHODS,
    graft_forward,
    graft_forward_features,
)
from dinov2_attn.grafting.modules import (
    go_by_kernel,
    go_by_projection,
    graft_attention,
    graft_block,
    graft_block_at_kernel,
)
from dinov2_attn.grafting.registry import GraftRegistry, Owner
from dinov2_attn.history.identify import warn_of_drift
from dinov2_attn.kernels.xformers import KERNEL, graft_kernel, kernel_namespace

# A method that calls another comes first, and is undone last. Otherwise upstream's forward would
# pass return_attention on to forward_features and drop what that returns.
_FORWARDS = {
    "forward": graft_forward,
    "forward_features": graft_forward_features,
}


class Transaction:
    """Grafts for one target, kept if the ``with`` block ends and undone if it raises."""

    def __init__(self, registry: GraftRegistry, target: Hashable) -> None:
        self.registry = registry
        self.target = target
        self._before = list(registry)
        registry.begun.append(self._before)  # until it ends, however it does

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.rollback()
        if self.registry.begun and self.registry.begun[-1] is self._before:
            self.registry.begun.pop()

    @property
    def has_new_grafts(self) -> bool:
        """Whether a graft was set since the beginning."""
        return any(graft not in self._before for graft in self.registry)

    def claim(self, owner: Owner, name: str) -> bool:
        """Return whether there is a graft on ``owner.name``, and keep it for the target too."""
        return self.registry.claim(owner, name, self.target)

    def set(self, owner: Owner, name: str, new: Callable[..., object]) -> None:
        """Set a graft for the target."""
        self.registry.set(owner, name, new, self.target)

    def rollback(self) -> None:
        """Undo every graft since the beginning, and release the target."""
        self.registry.roll_back(self._before)
        with suppress(PatchedOnTopError):  # what was proved before may stay under a later patch
            self.registry.release(self.target)


def graft_classes(
    registry: GraftRegistry,
    target: Hashable,
    classes: Iterable[tuple[type, Role]],
    *,
    fallback: bool,
    running: Collection[type] | None = None,
) -> dict[type, str]:
    """Graft ``classes`` for ``target``.

    Classes with a graft already keep it, for this target too. Classes come in the order in which
    they build on each other, so that each is proved on proved ones. Code of upstream that no known
    revision has is warned of once, when it is grafted.

    Args:
        registry: Holds the grafts.
        target: What they are for: the name of a package, or a live model.
        classes: Each class with its role.
        fallback: Whether to graft the kernels of xFormers that the classes call as well.
        running: The attention classes of which one must be left. None for any of ``classes``.

    A class whose attention is proved to be softmax(q kᵀ · scale) of its own projection goes by
    that. Every other class goes by its kernel. One that calls no kernel is left out.

    Returns:
        The classes that were left out, with the reasons.

    Raises:
        IncompatibleUpstreamError: If no attention class is left. Then nothing is grafted.

    """
    with grad_mode_kept(), Transaction(registry, target) as transaction:
        found = in_order(classes)
        options = constructor_options(found)
        refused: dict[type, Dinov2AttnError] = {}
        with proof.sandbox():
            for cls, role in found:
                try:
                    _graft(transaction, cls, role, options.get(role, {}))
                except (IncompatibleUpstreamError, UnfaithfulError) as error:
                    refused[cls] = error
        attentions = {cls for cls, role in found if role is Role.ATTENTION}
        _check_refused(attentions if running is None else running, refused)
        if fallback:
            _graft_kernels(transaction, [cls for cls, _ in found])
        else:
            registry.release(target, only_kernels=True)
        if transaction.has_new_grafts:
            warn_of_drift(registry.original, target, [cls for cls, _ in found])
    return {cls: in_one_line(error) for cls, error in refused.items()}


def _check_refused(needed: Collection[type], refused: Mapping[type, Dinov2AttnError]) -> None:
    """Raise the last error if none of the classes ``needed`` is left."""
    if refused and not set(needed) - set(refused):
        raise list(refused.values())[-1]


def constructor_options(classes: list[tuple[type, Role]]) -> dict[Role, dict[str, Any]]:
    """Return the arguments that build blocks and models from the first, most basic classes.

    The defaults of a class may be upstream's own, without a graft, if a user's model has an
    attention or a block of another class.
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


def _graft(transaction: Transaction, cls: type, role: Role, options: dict[str, Any]) -> None:
    """Graft ``cls`` by its projection where that is proved, otherwise by its kernel."""
    if role is not Role.TRANSFORMER and (
        "forward" not in vars(cls) or transaction.claim(cls, "forward")
    ):
        return
    before = list(transaction.registry)
    try:
        if role is Role.TRANSFORMER:
            _graft_transformer(transaction, cls, role, options)
        else:
            _graft_module(transaction, cls, role, options)
        go_by_projection(cls)
    except Exception as error:  # foreign code may raise anything
        transaction.registry.roll_back(before)
        _graft_at_kernel(transaction, cls, role, _as_incompatible(cls, error))


def _as_incompatible(cls: type, error: Exception) -> Dinov2AttnError:
    if isinstance(error, Dinov2AttnError):
        return error
    made = IncompatibleUpstreamError(
        f"{name_of(cls)} to be built and run small, as upstream's class can be",
        f"{type(error).__name__}: {error}",
        "Its weights are taken at its kernel.",
    )
    made.__cause__ = error
    return made


def _graft_at_kernel(
    transaction: Transaction, cls: type, role: Role, reason: Dinov2AttnError
) -> None:
    """Graft ``cls`` for weights that its own pass gives to its kernel. Its own names stay."""
    if role is Role.ATTENTION and not names_a_kernel(cls):
        raise proof.no_kernel(cls, "none in its code") from reason
    why = f"expected {reason.expected}; found {reason.found}"
    if role is Role.TRANSFORMER:
        go_by_kernel(cls, why)
        _graft_free_names(transaction, cls)
        return
    original: Any = transaction.registry.original(cls, "forward")
    if role is Role.ATTENTION:
        proof.prove_at_kernel(cls, original)
    go_by_kernel(cls, why)
    taken = contract.keyword_of(role) in contract.argument_names(original)
    if role is Role.ATTENTION:
        graft = graft_captured(original) if taken else graft_attention(original, None)
        transaction.set(cls, "forward", graft)
    elif not taken:
        transaction.set(cls, "forward", graft_block_at_kernel(original))


def _graft_free_names(transaction: Transaction, cls: type) -> None:
    """Graft the methods of a transformer that do not have our keyword or name already."""
    keyword = contract.keyword_of(Role.TRANSFORMER)
    for name, graft in _FORWARDS.items():
        if name in vars(cls) and not transaction.claim(cls, name):
            original: Any = vars(cls)[name]
            if keyword not in contract.argument_names(original):
                transaction.set(cls, name, graft(original))
    for name, method in METHODS.items():
        if not hasattr(cls, name):
            transaction.set(cls, name, method)


def _graft_module(transaction: Transaction, cls: type, role: Role, options: dict[str, Any]) -> None:
    contract.check_arguments(cls, role, "forward")
    original: Any = transaction.registry.original(cls, "forward")
    if role is Role.ATTENTION:
        kernel = proof.measure_kernel(cls, original)
        grafted = graft_attention(original, kernel)
        prove = partial(proof.prove_attention, cls, original, grafted, kernel)
    else:
        grafted = graft_block(original, role)
        prove = partial(proof.prove_block, cls, original, grafted, BLOCK_CHILDREN[role][1], options)
    transaction.set(cls, "forward", grafted)
    prove()


def _graft_transformer(
    transaction: Transaction, cls: type, role: Role, options: dict[str, Any]
) -> None:
    missing = [name for name in (*_FORWARDS, *METHODS) if not transaction.claim(cls, name)]
    if not missing:
        return
    contract.check_methods(cls, {name: METHODS[name] for name in missing if name in METHODS})
    for name in missing:
        if name in vars(cls) and name in _FORWARDS:
            contract.check_arguments(cls, role, name)
            transaction.set(cls, name, _FORWARDS[name](vars(cls)[name]))
        elif name in METHODS and not hasattr(cls, name):  # a base class may have it already
            transaction.set(cls, name, METHODS[name])
    proof.prove_transformer(cls, options)


def _graft_kernels(transaction: Transaction, classes: list[type]) -> None:
    for cls in classes:
        for method in filter(inspect.isfunction, vars(cls).values()):
            home = kernel_namespace(method)
            if home is not None and not transaction.claim(home, KERNEL):
                transaction.set(home, KERNEL, graft_kernel(home[KERNEL]))
