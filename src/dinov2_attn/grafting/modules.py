"""The functions set on attention modules and blocks.

Each is a plain function around upstream's own, which ``torch.compile`` and
``torch.export`` follow; asked nothing, it returns what upstream returns. What upstream's
arguments are called is read from its signature, never assumed: ``is_causal`` came in
where a hand-written patch would put ``return_attn``. Their own keyword is taken out of
``kwargs``: Dynamo of torch 2.1 cannot guard a default that it meets behind ``super()``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from dinov2_attn.backbone.backbone import MARK, accepts
from dinov2_attn.backbone.contract import argument_names, name_of
from dinov2_attn.backbone.structure import BLOCK_CHILDREN, Role
from dinov2_attn.errors import InvalidInputError, NotGraftedError
from dinov2_attn.grafting.capture import run_recorded
from dinov2_attn.grafting.channel import ACTIVE, STATE, publish, request
from dinov2_attn.grafting.compute import check_tokens, module_weights
from dinov2_attn.kernels.call import Kernel
from dinov2_attn.kernels.xformers import check_stochastic_depth
from dinov2_attn.typing import Forward


def graft_attention(original: Forward, kernel: Kernel) -> Forward:
    """Give ``Attention.forward`` or ``MemEffAttention.forward`` a ``return_attn``.

    Asked, it returns the weights ``(B, heads, Q, N)`` in place of the features
    ``(B, N, C)``, before dropout, in the dtype of the projection; value product and
    output projection do not run. ``queries`` selects rows and ``heads="mean"``
    averages heads, giving ``(B, Q, N)``. It replaces the attribute on the class, which
    every instance looks up at every call.
    """
    names = argument_names(original)

    def weights_of(self: nn.Module, args: Any, kwargs: Any, **selection: Any) -> Any:
        return module_weights(self, kernel, **_by_name(names, args, kwargs), **selection)

    @functools.wraps(original, updated=())
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("return_attn", False):
            return publish(weights_of(self, args, kwargs))
        if ACTIVE.on and STATE.recorders:
            return run_recorded(original, self, weights_of, args, kwargs)
        return original(self, *args, **kwargs)

    return extend_signature(original, forward, "return_attn")


def graft_block(original: Forward, role: Role) -> Forward:
    """Give a block's ``forward`` a ``return_attention``; a list in gives a list out.

    Asked, it returns the weights of its attention on its normalised input; the rest of
    the block does not run. A list of tensors is answered one by one: nested or not, norm
    and projection know no neighbours, so the weights are the same.
    """
    names = argument_names(original)
    norm, attention = BLOCK_CHILDREN[role]

    def weights_of(self: nn.Module, *args: Any, **kw: Any) -> Any:
        selection = {name: kw.pop(name, None) for name in ("queries", "heads")}
        tokens = _only_tokens(_by_name(names, args, kw))
        if isinstance(tokens, list):
            for tensor in tokens:
                check_tokens(tensor)
            check_stochastic_depth(self, tokens)
            return [weights_of(self, t, **selection) for t in tokens]
        check_tokens(tokens)
        causal = (self.is_causal,) if role is Role.CAUSAL_BLOCK else ()
        normed = getattr(self, norm)(tokens)
        return weights_from(getattr(self, attention), "return_attn", normed, *causal, **selection)

    @functools.wraps(original, updated=())
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("return_attention", False):
            return publish(weights_of(self, *args, **kwargs))
        if ACTIVE.on and STATE.listener is not None:
            return STATE.listener(original, weights_of, self, args, kwargs)
        return original(self, *args, **kwargs)

    return extend_signature(original, forward, "return_attention")


def weights_from(module: nn.Module, keyword: str, *args: Any, **selection: Any) -> Any:
    """Ask ``module``, or what it wraps; raise ``NotGraftedError`` if ``keyword`` has no answer."""
    # Compiled, sharded and checkpointed modules are wrappers that pass keywords on.
    if not (accepts(module, keyword) or any(accepts(inner, keyword) for inner in module.modules())):
        raise NotGraftedError(
            f"a module whose forward takes {keyword}, as install() leaves it",
            f"{name_of(type(module))}, whose forward was never grafted",
            "Call dinov2_attn.install(model) with the live model: its own classes are found.",
        )
    weights = request(module, *args, **{keyword: True}, **selection)
    if weights is None:
        raise NotGraftedError(
            f"{name_of(type(module))} to hand {keyword} on to the module it wraps",
            "that the wrapped module was called without it",
            "Let the wrapper's forward pass **kwargs on.",
        )
    return weights


def extend_signature(original: Forward, forward: Forward, keyword: str) -> Forward:
    """Show what a graft adds to ``original`` in ``help()``, and mark it as taking ``keyword``."""
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
    """Name positional arguments as upstream's signature does, and take no other names.

    An override that hands on ``*args, **kwargs`` names none: it gets tokens first.
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
