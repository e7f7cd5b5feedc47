"""Ask one tree of upstream's code, grafted or patched, for everything that both ways give.

    python both_ways.py TREE plugin|patched RESULT

A process holds one ``dinov2``, so each tree has its own, and test_patches.py compares what they
saved: tensors by name. Names say where a tensor stood, the kind of every container included.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# With this head_dim, head_dim**-0.5 and 1 / sqrt(head_dim) differ in their last bit.
HEADS, HEAD_DIM, DEPTH, PATCH = 2, 6, 4, 2
AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16)
# The dtype of parameters and images, what runs around them, and how many chunks.
CASES = {
    "float64": (torch.float64, nullcontext, 0),
    "float32": (torch.float32, nullcontext, 0),
    "chunked": (torch.float32, nullcontext, 2),
    "bfloat16": (torch.bfloat16, nullcontext, 0),
    "autocast": (torch.float32, AUTOCAST, 2),
}


def main(tree: str, way: str, result: str) -> None:
    sys.modules["xformers"] = None  # there is no kernel of it for the CPU
    sys.path.insert(0, tree)
    torch.set_num_threads(1)
    if way == "plugin":
        import dinov2_attn

        dinov2_attn.install()
    torch.save(dict(everything()), result)
    assert ("dinov2_attn" in sys.modules) == (way == "plugin")


def everything() -> Iterator[tuple[str, Tensor]]:
    from dinov2.layers import attention

    for xformers in (False, True):
        if xformers:
            pretend_xformers(attention)
        for name, (dtype, context, chunks) in CASES.items():
            with context():
                yield from leaves(ask_model(dtype, chunks), f"{name} {xformers=} model")
                yield from leaves(ask_modules(dtype, xformers), f"{name} {xformers=} modules")


def ask_model(dtype: torch.dtype, chunks: int) -> dict[str, Any]:
    """Everything with gradients; without, weights apart, which need not be the same bits."""
    model = build(dtype, chunks)
    images = noise(2, 3, 3 * PATCH, 4 * PATCH).to(dtype).requires_grad_()
    masks = noise(2, 12) > 0
    questions = features, weights, together
    answers = {ask.__name__: ask(model, images, masks) for ask in questions}
    answers["gradients"] = gradients(answers, [*model.parameters(), images])
    with torch.no_grad():
        answers["features without grad"] = features(model, images, masks)
        answers["weights without grad"] = weights(model, images, masks)
    return answers | {"training": train(model, images)}


def features(model: Any, images: Tensor, masks: Tensor) -> dict[str, Any]:
    """What upstream gives anyway."""
    return {
        "output": model(images, masks=masks),
        "dict": model.forward_features(images, masks),
        "layers": model.get_intermediate_layers(images, [0, 3]),
    }


def weights(model: Any, images: Tensor, masks: Tensor) -> dict[str, Any]:
    """The attention alone, asked for in every way."""
    pair = sizes(images)
    return {
        "last": model.get_last_self_attention(images, masks),
        "DINO v1": model.get_last_selfattention(images),
        "last of a list": model.get_last_self_attention(pair),
        "all": model.get_self_attention(images),
        "none": model.get_self_attention(images, 0),
        "two": model.get_self_attention(images, 2, masks),
        "chosen": model.get_self_attention(images, n=[-1, 1]),
        "list": model.get_self_attention(pair, [2, 0], [masks, None]),
    }


def together(model: Any, images: Tensor, masks: Tensor) -> dict[str, Any]:
    """Features and attention of one pass."""
    pair, asked = sizes(images), {"return_attention": True}
    return {
        "dict": model.forward_features(images, masks, **asked),
        "dicts": model.forward_features(pair, [masks, None], **asked),
        "output": model(images, masks, **asked),
        "outputs": model(pair, **asked),
        "training": model(images, is_training=True, **asked),
    }


def sizes(images: Tensor) -> list[Tensor]:
    return [images, images[:1, :, : 2 * PATCH]]


def train(model: Any, images: Tensor) -> dict[str, Any]:
    """Blocks that draw random numbers: weights must be those of the pass that drew them."""
    torch.manual_seed(1)
    answers = model.train().forward_features(images, return_attention=True)
    last = model.get_last_self_attention(images)
    # The next number shows whether a block ran that was not needed.
    return {"answers": answers, "last": last, "next number": torch.rand(1)}


def ask_modules(dtype: torch.dtype, xformers: bool) -> dict[str, Any]:
    """Blocks and attention by themselves, with all that models do not pass to them."""
    from dinov2.layers import attention, block

    dim = HEADS * HEAD_DIM
    tokens = noise(2, 5, dim).to(dtype).requires_grad_()
    answers: dict[str, Any] = {}
    for cls in (block.Block, block.NestedTensorBlock, getattr(block, "CausalAttentionBlock", None)):
        if cls:
            module = randomise(cls(dim, HEADS), dtype)
            answers[cls.__name__] = module(tokens)
            answers[f"{cls.__name__} asked"] = [
                module(tokens, return_attention=True),
                module([tokens, tokens[:1, :3]], return_attention=True),
            ]
    for cls in (attention.Attention, attention.MemEffAttention):
        module = randomise(cls(dim, HEADS), dtype)
        module.scale = 0.7  # which explicit code reads, and fused kernels do not
        answers[cls.__name__] = [module(tokens), module(tokens, return_attn=True)]
    if xformers:
        bias = noise(2, HEADS, 5, 5).to(dtype)
        answers["bias"] = module(tokens, attn_bias=bias, return_attn=True)
    return answers | {"gradients": gradients(answers, [tokens])}


def build(dtype: torch.dtype, chunks: int) -> Any:
    from dinov2.layers import MemEffAttention, NestedTensorBlock
    from dinov2.models.vision_transformer import DinoVisionTransformer

    registers = "num_register_tokens" in DinoVisionTransformer.__init__.__code__.co_varnames
    model = DinoVisionTransformer(
        img_size=4 * PATCH,
        patch_size=PATCH,
        embed_dim=HEADS * HEAD_DIM,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=2,
        init_values=1.0,
        drop_path_rate=0.4,
        block_fn=partial(NestedTensorBlock, attn_class=MemEffAttention),
        block_chunks=chunks,
        **({"num_register_tokens": 2} if registers else {}),
    )
    return randomise(model, dtype)


def randomise(module: Any, dtype: torch.dtype) -> Any:
    """Parameters of order one: freshly built modules attend all but evenly."""
    for i, parameter in enumerate(module.parameters()):
        parameter.data = noise(*parameter.shape, seed=i) / parameter.shape[-1] ** 0.5
    return module.to(dtype).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradients(answers: Any, inputs: list[Tensor]) -> list[Tensor]:
    outputs = [t for _, t in leaves(answers) if t.requires_grad]
    loss = sum((t.double() * noise(*t.shape)).sum() for t in outputs)
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [t for t in found if t is not None]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in ``value`` with its place there; ``None`` is passed over."""
    if isinstance(value, Tensor):
        yield name, value
    elif value is not None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, f"{name}/{type(value).__name__}.{key}")


def pretend_xformers(attention: Any) -> None:
    """Let the branch for xFormers run, on a kernel written from what xFormers documents."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, op: Any = None) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    plain = SimpleNamespace(memory_efficient_attention=kernel, unbind=torch.unbind)
    vars(attention).update(vars(plain), XFORMERS_AVAILABLE=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
