"""The functions set on attention modules and blocks.

Each is a plain function around upstream's own, which ``torch.compile`` and
``torch.export`` follow; asked nothing, it returns what upstream returns. What upstream's
arguments are called is read from its signature, never assumed: ``is_causal`` came in
where a hand-written patch would put ``return_attn``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_attn.attention import Heads, attention_weights, check_heads
from dinov2_attn.errors import InvalidInput, NotGrafted
from dinov2_attn.queries import Queries, Rows, place
from dinov2_attn.surgery.tap import TAP
from dinov2_attn.upstream.anatomy import Part
from dinov2_attn.upstream.contract import argument_names, name_of
from dinov2_attn.upstream.kernel import Forward, Kernel, project

# The norm before the attention and the attention itself, by upstream's names.
BLOCK_CHILDREN = {
    Part.BLOCK: ("norm1", "attn"),
    Part.CAUSAL_BLOCK: ("attention_norm", "attention"),
}

_MARK = "_dinov2_attn_keyword"


def graft_attention(original: Forward, kernel: Kernel) -> Forward:
    """Give ``Attention.forward`` or ``MemEffAttention.forward`` a ``return_attn``.

    Asked, it returns the weights ``(B, heads, Q, N)`` in place of the features
    ``(B, N, C)``, before dropout, in the dtype of the projection; value product and
    output projection do not run. ``queries`` selects rows and ``heads="mean"``
    averages heads, giving ``(B, Q, N)``. It replaces the attribute on the class, which
    every instance looks up at every call.
    """
    names = argument_names(original) or ["x"]  # an override may hand on *args, **kwargs

    @functools.wraps(original, updated=())
    def forward(self: nn.Module, *args: Any, return_attn: bool = False, **kwargs: Any) -> Any:
        if not return_attn:
            return original(self, *args, **kwargs)
        return _attend(self, kernel, **_by_name(names, args, kwargs))

    return announce(original, forward, "return_attn")


def graft_block(original: Forward, part: Part) -> Forward:
    """Give a block's ``forward`` a ``return_attention``; a list in gives a list out.

    Asked, it returns the weights of its attention on its normalised input; the rest of
    the block does not run. A list of tensors is answered one by one, whether or not
    xFormers could nest them.
    """
    names = argument_names(original) or ["x"]
    norm, attention = BLOCK_CHILDREN[part]

    def ask(
        self: nn.Module, *args: Any, queries: Queries = None, heads: Heads = None, **kw: Any
    ) -> Any:
        tokens = _only_tokens(_by_name(names, args, kw))
        if isinstance(tokens, list):
            return [ask(self, t, queries=queries, heads=heads) for t in tokens]
        child = getattr(self, attention)
        require_graft(child, "return_attn")
        causal = (self.is_causal,) if part is Part.CAUSAL_BLOCK else ()
        normed = getattr(self, norm)(tokens)
        return child(normed, *causal, return_attn=True, queries=queries, heads=heads)

    @functools.wraps(original, updated=())
    def forward(self: nn.Module, *args: Any, return_attention: bool = False, **kwargs: Any) -> Any:
        if return_attention:
            return ask(self, *args, **kwargs)
        if TAP.listener is not None:
            TAP.listener(self, ask, args, kwargs)
        return original(self, *args, **kwargs)

    return announce(original, forward, "return_attention")


def require_graft(module: nn.Module, keyword: str) -> None:
    """Raise ``NotGrafted`` unless ``module``, or what it wraps, takes ``keyword``."""
    # Compiled, sharded and checkpointed modules are wrappers that pass keywords on.
    if _takes(module, keyword) or any(_takes(inner, keyword) for inner in module.modules()):
        return
    raise NotGrafted(
        f"a module whose forward takes {keyword}, as install() leaves it",
        f"{name_of(type(module))}, whose forward was never grafted",
        "Call dinov2_attn.install(model) with the live model, so that its own classes are found.",
    )


def announce(original: Forward, forward: Forward, keyword: str) -> Forward:
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
    setattr(forward, _MARK, keyword)
    return forward


def _attend(
    module: nn.Module,
    kernel: Kernel,
    *,
    x: Tensor,
    attn_bias: Any = None,
    is_causal: bool = False,
    queries: Queries = None,
    heads: Heads = None,
) -> Tensor:
    check_heads(heads)
    query, key, _ = project(module, x)
    rows = place(queries, x.shape[1])
    positions = torch.arange(x.shape[1], device=x.device)[rows] if is_causal else None
    return attention_weights(
        query[:, :, rows],
        key,
        kernel.scale(module),
        bias=_bias_rows(attn_bias, rows),
        causal_rows=positions,
        heads=heads,
    )


def _bias_rows(bias: object, rows: Rows) -> Tensor | None:
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        raise InvalidInput(
            "attn_bias to be None or a dense tensor when attention is asked for",
            name_of(type(bias)),
            "Pass the list of tensors to the block or the model instead of their concatenation.",
        )
    return bias if bias.shape[-2] == 1 else bias[..., rows, :]


def _by_name(names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name positional arguments as upstream's signature does."""
    if len(args) > len(names):
        raise InvalidInput(
            f"at most {len(names)} positional arguments ({', '.join(names)})",
            f"{len(args)}",
            "Pass return_attn, return_attention, queries and heads by keyword.",
        )
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _only_tokens(arguments: Mapping[str, Any]) -> Any:
    if len(arguments) != 1:
        raise InvalidInput(
            "the tokens of a block, and besides them return_attention, queries and heads",
            ", ".join(arguments) or "nothing",
            "Pass one tensor (B, N, C) or a list of them.",
        )
    return next(iter(arguments.values()))


def _takes(module: nn.Module, keyword: str) -> bool:
    return getattr(type(module).forward, _MARK, None) == keyword
