"""Models that registers are added to, and their passes written by hand."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from dinov2_attn.backbone.backbone import flat_blocks
from tests.support import dinov3, upstreams
from tests.support.planted_registers import last_of
from tests.support.strategies import randomise

COUNTED = tuple(u for u in upstreams.WITH_MODELS if u.name not in {"dinov2", "roma"})
GRID, PLACES = (6, 7), [(1, 5), (4, 0), (2, 3)]
LAYER, NEURONS = 2, [5, 11]


def dinov2(upstream, registers=0, **options):
    """Return a model of 6 blocks in float64, whose attention is sharp."""
    options = {"depth": 6, "block_chunks": 0, "mlp_ratio": 2, "init_values": 1.0, **options}
    model = upstream.cls("DinoVisionTransformer")(
        img_size=8, patch_size=2, embed_dim=32, num_heads=4,
        num_register_tokens=registers, **options,
    )  # fmt: skip
    return randomise(model.double(), 1)


def dinov3_of(copy_of, **options):
    options = {"depth": 6, "n_storage_tokens": 0, "mask_k_bias": False, **options}
    model = copy_of.load().build(**options).double()
    return randomise(model, 2)


KINDS = {
    **{f"{u}-{r}": partial(dinov2, u, r) for u in COUNTED for r in (0, 4)},
    "chunked": partial(dinov2, upstreams.LIGHTLY, 2, block_chunks=2),
    "swiglu": partial(dinov2, upstreams.LIGHTLY, 1, ffn_layer="swiglu"),
    **{
        f"dinov3-{c}-{r}-{ffn}": partial(dinov3_of, c, n_storage_tokens=r, ffn_layer=ffn)
        for c in dinov3.COPIES
        for r, ffn in ((0, "mlp"), (4, "swiglu"))
    },
}


def registers_of(model):
    name = "n_storage_tokens" if hasattr(model, "n_storage_tokens") else "num_register_tokens"
    return getattr(model, name)


def features_of(model, images):
    """Return CLS, registers and patches of the model's own ``forward_features``."""
    found = model.forward_features(images)
    registers = next(found[n] for n in ("x_norm_regtokens", "x_storage_tokens") if n in found)
    return found["x_norm_clstoken"], registers, found["x_norm_patchtokens"], found["x_prenorm"]


def neurons_by_hand(mlp, tokens):
    if hasattr(mlp, "fc1"):
        return F.gelu(mlp.fc1(tokens))
    if hasattr(mlp, "w12"):
        first, second = mlp.w12(tokens).chunk(2, dim=-1)
    else:
        first, second = mlp.w1(tokens), mlp.w2(tokens)
    return F.silu(first) * second


def by_hand(model, images, neurons, count):
    """Return tokens before the final norm, and the input of each attention, one image at a time."""
    own = registers_of(model)
    outputs, inputs = [], []
    for image in images:
        given = model.prepare_tokens_with_masks(image[None])
        tokens, size = given if isinstance(given, tuple) else (given, None)
        zeros = torch.zeros(1, count, tokens.shape[2], dtype=tokens.dtype)
        tokens = torch.cat([tokens[:, : 1 + own], zeros, tokens[:, 1 + own :]], dim=1)
        patches, inputs_of_image = range(1 + own + count, tokens.shape[1]), []
        for layer, block in enumerate(flat_blocks(model.blocks)):
            normed = block.norm1(tokens)
            inputs_of_image.append(normed)
            rope = {} if size is None else {"rope": model.rope_embed(H=size[0], W=size[1])}
            tokens = tokens + block.ls1(block.attn(normed, **rope))
            hidden = neurons_by_hand(block.mlp, block.norm2(tokens))
            for neuron in neurons.get(layer, []):
                largest = max(hidden[0, :, neuron].tolist(), key=abs)
                for token in range(tokens.shape[1]):
                    if token in patches:
                        hidden[0, token, neuron] = 0
                    elif token > own:
                        hidden[0, token, neuron] = largest
            tokens = tokens + block.ls2(last_of(block.mlp)(hidden))
        outputs.append(tokens)
        inputs.append(inputs_of_image)
    return torch.cat(outputs), [torch.cat(layer) for layer in zip(*inputs, strict=True)]
