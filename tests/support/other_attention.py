"""Attention that is not upstream's formula, each with the truth: what its kernel is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dinov2_attn
from tests.support import upstreams
from tests.support.recordings import IMAGES, assert_all_close, build
from tests.support.tolerances import assert_close, assert_same_bits

Change = Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def split(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values ``(B, heads, N, d)``, as upstream's projection has them."""
    B, N, C = x.shape
    qkv = module.qkv(x).reshape(B, N, 3, module.num_heads, C // module.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attend(module: Any, x: Tensor, change: Change) -> Any:
    """Run PyTorch's kernel on changed queries, keys and values."""
    q, k, v = change(module, *split(module, x))
    out = F.scaled_dot_product_attention(q, k, v)
    return module.proj(out.transpose(1, 2).reshape(x.shape))


def softmax_of(q: Tensor, k: Tensor) -> Tensor:
    """Return the weights of queries and keys from the definition, in float64."""
    scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double()) / q.shape[-1] ** 0.5
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)


def changed_truth(change: Change) -> Callable[..., Tensor]:
    """Return the function that gives the weights of a module after ``change``."""

    def truth(module: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, _value = change(module, *split(module, x))
        return softmax_of(q, k)

    return truth


def _rotated(_: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    angle = torch.arange(q.shape[2], dtype=q.dtype)[:, None]
    q, k = (t * angle.cos() + t.roll(1, -1) * angle.sin() for t in (q, k))
    return q, k, v


# Each changes one thing between projection and kernel, without a new argument or attribute.
CHANGES: dict[str, Change] = {
    "queries and keys normalised": lambda _, q, k, v: (
        F.normalize(q, dim=-1),
        F.normalize(k, dim=-1),
        v,
    ),
    "queries and keys rotated by position": _rotated,
    "queries shifted by one token": lambda _, q, k, v: (q.roll(1, 2), k, v),
    "queries flipped": lambda _, q, k, v: (q.flip(-1), k, v),
    "keys before queries": lambda _, q, k, v: (k, q, v),
    "heads in another order": lambda _, q, k, v: (q.flip(1), k.flip(1), v),
    "scaled twice": lambda s, q, k, v: (q * s.scale, k, v),
    "values before keys": lambda _, q, k, v: (q, v, k),
}


def model_with(attention: Any = None, block: Any = None, model: Any = None) -> Any:
    """Return a small model of MoGe's copy whose parts are of these classes."""
    made = build(upstreams.MOGE)
    for layer in made.blocks:
        if attention is not None:
            layer.attn.__class__ = attention
        if block is not None:
            layer.__class__ = block
    if model is not None:
        made.__class__ = model
    return made


def inputs_of(modules: list[nn.Module], run: Callable[[], object]) -> list[tuple[Any, Any]]:
    """Run, and return the arguments of each of ``modules``, in the order of the pass."""
    seen: list[tuple[Any, Any]] = []
    hooks = [
        m.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((module, (args, kwargs))), with_kwargs=True
        )
        for m in modules
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def expected_weights(model: Any, truth: Callable[..., Tensor]) -> list[Tensor]:
    """Return the true weights of each block, from the inputs of its attention in a plain pass."""
    calls = inputs_of([b.attn for b in model.blocks], lambda: model.forward_features(IMAGES))
    return [truth(module, *args, **kwargs) for module, (args, kwargs) in calls]


def tensors_of(features: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of what ``forward_features`` returns, without the masks."""
    return {name: value for name, value in features.items() if isinstance(value, Tensor)}


@contextmanager
def right_in_every_way(model: Any, truth: Callable[..., Tensor]) -> Iterator[dinov2_attn.Status]:
    """Install, and compare what every function returns with ``truth``. Yield the status.

    Features are the bits of the model without the package.
    """
    plain, output = tensors_of(model.forward_features(IMAGES)), model(IMAGES)
    expected = expected_weights(model, truth)
    with dinov2_attn.install(model):
        status = dinov2_attn.status()
        for _ in range(2):  # the first pass runs to its end, the others stop early
            assert_all_close(model.get_self_attention(IMAGES), expected)
            assert_close(model.get_last_self_attention(IMAGES), expected[-1])
            some = model.get_self_attention(IMAGES, [0], queries="cls", heads="mean")
            assert_close(some[0], expected[0][:, :, :1].mean(1))
        assert_same_bits(tensors_of(model.forward_features(IMAGES)), plain)
        assert_same_bits(model(IMAGES), output)
        both = model.forward_features(IMAGES, return_attention=True)
        assert_all_close(both.pop("attentions"), expected)
        assert_same_bits(tensors_of(both), plain)
        again, attentions = model(IMAGES, return_attention=True)
        assert_same_bits(again, output)
        assert_all_close(attentions, expected)
        with dinov2_attn.record(model) as maps:
            assert_same_bits(model(IMAGES), output)
        assert_all_close(maps.weights, expected)
        yield status


def parts_are_right(model: Any, truth: Callable[..., Tensor]) -> None:
    """Compare what blocks and attention modules return when they are asked themselves."""
    expected = expected_weights(model, truth)
    blocks = inputs_of(list(model.blocks), lambda: model.forward_features(IMAGES))
    modules = inputs_of([b.attn for b in model.blocks], lambda: model.forward_features(IMAGES))
    for calls, keyword in ((blocks, "return_attention"), (modules, "return_attn")):
        for (part, (args, kwargs)), weights in zip(calls, expected, strict=True):
            assert_close(part(*args, **kwargs, **{keyword: True}), weights)
