"""The functions set on attention modules and blocks.

Each is a plain function around upstream's own, so that ``torch.compile`` and ``torch.export``
trace it. Without its keyword it returns what upstream returns. Argument names are read from
upstream's signature: ``is_causal`` came in where a hand-written patch would put ``return_attn``.
The keyword is taken out of ``kwargs``, because Dynamo of torch 2.1 cannot guard a default that it
meets behind ``super()``.

Weights are taken from the projection of a class, or at its kernel. The projection is faster where
few rows are asked for, and graphs need it. It serves classes that are proved to compute nothing
else between projection and kernel. All others go by the kernel.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from dinov2_attn._compat import is_compiling, is_transformed
from dinov2_attn.backbone.backbone import MARK, accepts
from dinov2_attn.backbone.contract import argument_names
from dinov2_attn.backbone.projection import Piece, check_tokens, module_weights, queries_and_keys
from dinov2_attn.backbone.structure import BLOCK_CHILDREN, Role, name_of
from dinov2_attn.errors import InvalidInputError, NotGraftedError
from dinov2_attn.grafting.channel import (
    ACTIVE,
    STATE,
    edited_in_a_graph,
    is_edited_here,
    run_captured,
)
from dinov2_attn.grafting.collector import weights_at_kernel
from dinov2_attn.kernels.xformers import Kernel, check_stochastic_depth
from dinov2_attn.math.attention import check_heads
from dinov2_attn.typing import Forward, Heads, Queries


class Returns(Enum):
    """What this package itself passes as ``return_attn`` in place of ``True``."""

    QUERIES_AND_KEYS = "queries and keys"


# The classes whose weights are taken at the kernel, each with the reason.
_AT_KERNEL: WeakKeyDictionary[type, str] = WeakKeyDictionary()


def go_by_kernel(cls: type, reason: str) -> None:
    """Take the weights of ``cls`` at the kernel from now on."""
    _AT_KERNEL[cls] = reason


def go_by_projection(cls: type) -> None:
    """Take the weights of ``cls`` from its projection from now on."""
    _AT_KERNEL.pop(cls, None)


def reason_for_kernel(cls: type) -> str | None:
    """Return why the weights of ``cls`` are taken at the kernel, None if they are not."""
    return next((_AT_KERNEL[base] for base in cls.__mro__ if base in _AT_KERNEL), None)


def classes_at_kernel(classes: Iterable[type]) -> dict[type, str]:
    """Return those of ``classes`` whose weights are taken at the kernel, with the reasons."""
    return {cls: _AT_KERNEL[cls] for cls in classes if cls in _AT_KERNEL}


def are_edited() -> bool:
    """Return whether something edits weights in this thread."""
    return ACTIVE.on and is_edited_here()


def runs_itself(model: nn.Module) -> bool:
    """Return whether ``model`` has to run its own pass, because a part goes by the kernel.

    Where weights are edited, all parts do.
    """
    if are_edited():
        return True
    return bool(_AT_KERNEL) and any(
        reason_for_kernel(cls) is not None for cls in {type(m) for m in model.modules()}
    )


# Runs the first function, a block's forward, and gets the weights from the second.
Listener = Callable[[Forward, Forward, nn.Module, tuple[Any, ...], dict[str, Any]], Any]


class _State(threading.local):
    """The listener of this thread, and what its grafts returned."""

    def __reduce__(self) -> str:
        return "ASKED"  # as ``STATE`` of channel.py

    def __init__(self) -> None:
        # On the instance from the start, in every thread: Dynamo guards on their presence too.
        self.listener: Listener | None = None
        self.published: list[Any] | None = None


ASKED = _State()


def graft_attention(original: Forward, kernel: Kernel | None) -> Forward:
    """Give ``Attention.forward`` or ``MemEffAttention.forward`` a ``return_attn``.

    With ``return_attn=True`` it returns the weights ``(B, heads, Q, N)`` in place of the features
    ``(B, N, C)``. They are those before dropout, in the dtype of the projection. Value product
    and output projection do not run. ``queries`` selects rows. ``heads="mean"`` averages heads,
    which gives ``(B, Q, N)``. Without ``kernel`` they are taken at the kernel that runs.
    """
    names = argument_names(original)

    def weights_of(self: nn.Module, args: Any, kwargs: Any) -> Any:
        if are_edited() and is_transformed():
            raise edited_in_a_graph()
        if kernel is None or are_edited():
            selection = {name: kwargs.pop(name, None) for name in ("queries", "heads")}
            check_heads(selection["heads"])
            run = partial(forward, self, *args, **kwargs)
            return weights_at_kernel(run, self, [self], **selection)
        return module_weights(self, kernel, **_by_name(names, args, kwargs))

    @functools.wraps(original, updated=())
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if asked := kwargs.pop("return_attn", False):
            if asked is Returns.QUERIES_AND_KEYS and kernel is not None:
                return publish(queries_and_keys(self, kernel, **_by_name(names, args, kwargs)))
            return publish(weights_of(self, args, kwargs))
        if ACTIVE.on and (STATE.receivers or ACTIVE.edits):
            return run_captured(original, self, args, kwargs)
        return original(self, *args, **kwargs)

    return extend_signature(original, forward, "return_attn")


def graft_block_at_kernel(original: Forward) -> Forward:
    """Give a block's ``forward`` a ``return_attention``, taken at the kernel of its own pass.

    It serves blocks of any signature. The pass ends where the weights are known. A list is
    answered tensor by tensor; other lists of its length are one value for each. In training with
    stochastic depth it runs all samples, also those that the block would drop.
    """

    def weights_of(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        selection = {name: kwargs.pop(name, None) for name in ("queries", "heads")}
        check_heads(selection["heads"])
        tokens = next(iter((*args, *kwargs.values())), None)
        if not isinstance(tokens, list):
            return of_one(self, args, kwargs, selection)
        return [
            of_one(
                self,
                tuple(_element(value, i, len(tokens)) for value in args),
                {name: _element(value, i, len(tokens)) for name, value in kwargs.items()},
                selection,
            )
            for i in range(len(tokens))
        ]

    def of_one(self: nn.Module, args: Any, kwargs: Any, selection: Any) -> Any:
        run = partial(original, _with_all_samples(self), *args, **kwargs)
        return weights_at_kernel(run, self, **selection)

    @functools.wraps(original, updated=())
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("return_attention", False):
            return publish(weights_of(self, *args, **kwargs))
        if ACTIVE.on and ASKED.listener is not None:
            return ASKED.listener(original, weights_of, self, args, kwargs)
        return original(self, *args, **kwargs)

    return extend_signature(original, forward, "return_attention")


def _element(value: Any, i: int, length: int) -> Any:
    return value[i] if isinstance(value, list) and len(value) == length else value


def _with_all_samples(block: nn.Module) -> nn.Module:
    """Return ``block``, or where it drops samples a copy with the same children that does not."""
    if not (block.training and getattr(block, "sample_drop_ratio", None)):
        return block
    whole: Any = copy.copy(block)
    whole.sample_drop_ratio = 0.0
    return whole  # type: ignore[no-any-return]


def graft_block(original: Forward, role: Role) -> Forward:
    """Give a block's ``forward`` a ``return_attention``.

    With ``return_attention=True`` it returns the weights of its attention on its normalised input.
    The rest of the block does not run. A list of tensors gives a list, tensor by tensor: norm and
    projection are the same for a nested list, so the weights are too.
    """
    names = argument_names(original)
    norm, attention = BLOCK_CHILDREN[role]
    at_kernel = graft_block_at_kernel(original)

    def weights_of(self: nn.Module, *args: Any, **kw: Any) -> Any:
        asked = kw.pop("asked", True)
        if not is_compiling() and runs_itself(
            self
        ):  # its attention may have a return_attn of its own
            return at_kernel(self, *args, return_attention=True, **kw)
        selection = {name: kw.pop(name) for name in ("queries", "heads") if name in kw}
        tokens = _only_tokens(_by_name(names, args, kw))
        if isinstance(tokens, list):
            for tensor in tokens:
                check_tokens(tensor)
            check_stochastic_depth(self, tokens)
            return [weights_of(self, t, **selection) for t in tokens]
        check_tokens(tokens)
        causal = (self.is_causal,) if role is Role.CAUSAL_BLOCK else ()
        normed = getattr(self, norm)(tokens)
        inner = getattr(self, attention)
        return _result_of(inner, "return_attn", asked, normed, *causal, **selection)

    @functools.wraps(original, updated=())
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if asked := kwargs.pop("return_attention", False):
            return publish(weights_of(self, *args, asked=asked, **kwargs))
        if ACTIVE.on and ASKED.listener is not None:
            return ASKED.listener(original, weights_of, self, args, kwargs)
        return original(self, *args, **kwargs)

    return extend_signature(original, forward, "return_attention")


def weights_from(block: nn.Module, tokens: Any, *, queries: Queries, heads: Heads) -> Any:
    """Return the weights of ``block``, or of the block that it wraps, on ``tokens``.

    Raises:
        NotGraftedError: If no graft returned weights.

    """
    return _result_of(block, "return_attention", True, tokens, queries=queries, heads=heads)


def queries_and_keys_from(
    block: nn.Module, tokens: Tensor, queries: Queries
) -> list[tuple[Piece, float]]:
    """Return what the weights of ``block`` on ``tokens`` are made of, without making them.

    Args:
        block: A transformer block, or a wrapper around one.
        tokens: Its input, ``(B, N, C)``.
        queries: The rows, None for all.

    Returns:
        Pieces of the batch, each with the scale of its products.

    Raises:
        NotGraftedError: If no graft returned them.
        InvalidInputError: If a mask or bias decides about the weights too.

    """
    asked = Returns.QUERIES_AND_KEYS
    found = _result_of(block, "return_attention", asked, tokens, queries=queries)
    return cast("list[tuple[Piece, float]]", found)


def _result_of(module: nn.Module, keyword: str, asked: object, *args: Any, **selection: Any) -> Any:
    """Call ``module`` with ``keyword=asked``, and return what the graft in it returned."""
    # Compiled, sharded and checkpointed modules are wrappers that pass keywords on.
    if not (accepts(module, keyword) or any(accepts(inner, keyword) for inner in module.modules())):
        raise NotGraftedError(
            f"a module whose forward takes {keyword}, as install() leaves it",
            f"{name_of(type(module))}, whose forward was never grafted",
            "Call dinov2_attn.install(model) with the live model: its own classes are found.",
        )
    weights = request(module, *args, **{keyword: asked}, **selection)
    if weights is None:
        raise NotGraftedError(
            f"{name_of(type(module))} to hand {keyword} on to the module it wraps",
            "that the wrapped module was called without it",
            "Let the wrapper's forward pass **kwargs on.",
        )
    return weights


def extend_signature(original: Forward, forward: Forward, keyword: str) -> Forward:
    """Give ``forward`` the signature of ``original`` plus ``keyword``, and mark it with that."""
    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    variadic = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    end = len(parameters) - 1 if variadic else len(parameters)
    parameters[end:end] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in ((keyword, False), ("queries", None), ("heads", None))
    ]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    setattr(forward, MARK, keyword)
    return forward


def _by_name(names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments by the names of upstream's signature.

    An override with ``*args, **kwargs`` has no names. Tokens come first then.
    """
    extra = {"queries", "heads"}
    if names and (unknown := [name for name in kwargs if name not in {*names, *extra}]):
        raise InvalidInputError(
            f"the arguments {', '.join(names)}, queries and heads",
            ", ".join(unknown),
            "This class takes no other.",
        )
    names = names or ["x"]
    if len(args) > len(names):
        raise InvalidInputError(
            f"at most {len(names)} positional arguments ({', '.join(names)})",
            f"{len(args)}",
            "Pass return_attn, return_attention, queries and heads by keyword.",
        )
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _only_tokens(arguments: Mapping[str, Any]) -> Any:
    if len(arguments) != 1:
        raise InvalidInputError(
            "the tokens of a block, and besides them return_attention, queries and heads",
            ", ".join(arguments) or "nothing",
            "Pass one tensor (B, N, C) or a list of them.",
        )
    return next(iter(arguments.values()))


def request(module: nn.Module, *args: Any, **keywords: Any) -> Any:
    """Call ``module``, and return what a graft in it published last, ``None`` if none did.

    The return value is not used, because forward hooks, adapters and wrappers that drop keywords
    change it.
    """
    before, ASKED.published = ASKED.published, []
    try:
        module(*args, **keywords)
        return ASKED.published[-1] if ASKED.published else None
    finally:
        ASKED.published = before


def publish(result: Any) -> Any:
    """Return ``result`` from a graft, and give it to the ``request`` that waits for it."""
    if ASKED.published is not None:
        ASKED.published.append(result)
    return result
