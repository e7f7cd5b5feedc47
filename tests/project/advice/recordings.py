"""Advice about recordings, and what is made of maps."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from dinov2_attn import artifact_tokens, attention_maps, edit, record, rollout
from dinov2_attn.backbone.backbone import backbone_in
from dinov2_attn.kernels.call import fused_call
from dinov2_attn.maps.attention_maps import AttentionMaps
from tests.support.advice import Table
from tests.support.compiling import compiles
from tests.support.recordings import Around

CASES = Table()
case = CASES.add


def recorded(model, run, *args, **options):
    with record(model, *args, **options) as recording:
        run()
    return recording


# Recordings


def twice(lab):
    with record(lab.model) as recording:
        lab.model(lab.x)
        lab.model(lab.x)
    return recording


case(
    "maps",
    "Each forward pass is an entry of .passes",
    lambda lab: twice(lab).weights,
    lambda lab: [one.weights for one in twice(lab).passes],
)
case(
    "maps",
    "lambda layer, weights: weights.mean(1).cpu()",
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), reduce="mean"),
    lambda lab: recorded(
        lab.model,
        lambda: lab.model(lab.x),
        reduce=lambda layer, weights: weights.mean(1).cpu(),
    ),
)
case(
    "maps",
    "Run the model inside the block, in the same thread",
    lambda lab: recorded(lab.model, lambda: None),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x)),
)
case(
    "maps",
    "Pass the module whose forward will run",
    lambda lab: recorded(lab.model.forward, lambda: lab.model(lab.x)),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x)),
)
case(
    "maps",
    "Leave layers out for all",
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), []),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x)),
)
case(
    "maps",
    "Did you mean",
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), ["block.0.attn"]),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), ["blocks.0.attn"]),
)
case(
    "maps",
    "Pass the model that contains the attention",
    lambda lab: recorded(nn.Linear(2, 2), lambda: None),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x)),
)
case(
    "maps",
    "Count CLS and the registers: prefix=5",
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), prefix=-1),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), prefix=1),
)
case(
    "maps",
    "Pass a pair: grid=(16, 16)",
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), grid=6),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), grid=(2, 3)),
)
case(
    "maps",
    "Pass positions, or say prefix= too",
    lambda lab: recorded(*from_tokens(lab), queries="patches"),
    lambda lab: (
        recorded(*from_tokens(lab), queries=[1, 2]),
        recorded(*from_tokens(lab), queries="patches", prefix=1),
    ),
)
case(
    "maps",
    "Leave it out to prove each layer in its first pass",
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), check="sometimes"),
    lambda lab: (
        recorded(lab.model, lambda: lab.model(lab.x)),
        recorded(lab.model, lambda: lab.model(lab.x), check="every"),
    ),
)


def from_tokens(lab):
    """Return a model of tokens, which have no grid, and what runs it."""
    model = nn.Sequential(lab.block)
    return model, lambda: model(lab.tokens)


class FromOutside(nn.Module):
    """Calls the kernels of its attention modules itself, from ``inside`` on."""

    def __init__(self, lab, inside):
        super().__init__()
        self.blocks, self.inside, self.tokens = lab.model.blocks, inside, lab.tokens

    def forward(self):
        for block in self.blocks[: self.inside]:
            block(self.tokens)


def from_outside(lab, inside):
    model = FromOutside(lab, inside)
    return model, model


case(
    "maps",
    "Try model.eval(), or an eager model",
    lambda lab: recorded(*from_outside(lab, 0)),
    lambda lab: recorded(lab.model.eval(), lambda: lab.model(lab.x)),
)
case(
    "maps",
    "Name the layers that do run",
    lambda lab: recorded(*from_outside(lab, 1)),
    lambda lab: recorded(*from_outside(lab, 1), ["blocks.0.attn"]),
)


class Twice(nn.Module):
    """Attention that calls its kernel as often as it is told, and a sibling that does not."""

    def __init__(self, times):
        super().__init__()
        self.once, self.attn = Calling(1), Calling(times)

    def forward(self, x):
        return self.once(x) + self.attn(x)


class Calling(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.qkv, self.proj, self.times = nn.Linear(4, 12), nn.Linear(4, 4), times

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, -1)
        kernel = nn.functional.scaled_dot_product_attention
        return sum(self.proj(kernel(query, key, value)) for _ in range(self.times))


def twice_in_one(*layers):
    model, x = Twice(2), torch.zeros(1, 3, 4)
    return recorded(model, lambda: model(x), *layers)


case(
    "kernels",
    "Leave this module out with layers=[...]",
    lambda _: twice_in_one(),
    lambda _: twice_in_one(["once"]),
)


def unfaithful():
    """Check a call whose output another scale made."""
    query = torch.eye(4)[None, None]
    call = fused_call(query, query, query)
    replace(call, output=query).check("layer 3")


case(
    "kernels",
    "record(..., check=False) records it unproved",
    lambda _: unfaithful(),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), check=False),
)


def compiled(lab):
    if not compiles():
        pytest.skip("this torch cannot compile on this Python")
    torch._dynamo.reset()
    return torch.compile(lab.model, backend="eager")


def record_compiled(lab):
    model = compiled(lab)
    recorded(model, lambda: model._orig_mod(lab.x))
    with torch.compiler.set_stance("force_eager"):
        return recorded(model, lambda: model(lab.x))


case(
    "grafting",
    "compiled._orig_mod(images), or compiled(images) under torch.compiler.set_stance",
    lambda lab: recorded(lab.model, lambda: compiled(lab)(lab.x)),
    record_compiled,
)

# What is made of maps


def of_tokens(lab):
    return recorded(lab.model, lambda: [block(lab.tokens) for block in lab.model.blocks])


def saved(lab, maps, name="maps.safetensors"):
    path = lab.folder / name
    maps.save(path)
    return path


case(
    "maps",
    "dataclasses.replace(maps, grid=(h, w))",
    lambda lab: of_tokens(lab).patch_maps(),
    lambda lab: replace(of_tokens(lab).passes[0], grid=(2, 3)).patch_maps(),
)
case(
    "backbone",
    "Correct prefix, suffix or grid",
    lambda lab: replace(lab.maps(), grid=(3, 3)).patch_maps(),
    lambda lab: replace(replace(lab.maps(), grid=(3, 3)), grid=(2, 3)).patch_maps(),
)
case(
    "backbone",
    "or keep the columns in reduce",
    lambda lab: recorded(
        lab.model, lambda: lab.model(lab.x), reduce=lambda _, weights: weights[..., 1:]
    ).patch_maps(),
    lambda lab: recorded(
        lab.model, lambda: lab.model(lab.x), reduce=lambda _, weights: weights.mean(-2)
    ).patch_maps(),
)
case(
    "backbone",
    "Pass the vision transformer itself",
    lambda lab: backbone_in(nn.ModuleList([lab.model, copy.deepcopy(lab.model)])),
    lambda lab: backbone_in(lab.model),
)


# Models that run their own pass


class Turns(nn.Module):
    """Two lists of upstream's blocks, whose layers take turns."""

    def __init__(self, model):
        super().__init__()
        self.patch_embed, self.first, self.second = model.patch_embed, model.blocks[:1], nn.Module()
        self.second.blocks = model.blocks[1:2]

    def forward(self, images):
        tokens = self.first[0](self.patch_embed(images))
        return self.second.blocks[0](tokens * 2)


class TwiceInOne(nn.Module):
    """A transformer that runs twice in a pass."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images) + self.inner(images.flip(-1))


def passes(model, images):
    return recorded(model, lambda: model(images)).passes


def in_training(lab, *, evaluated):
    """Roll out a model that runs its own pass and may drop samples."""
    model = Around(lab.model).train()
    for block in lab.model.blocks:
        block.sample_drop_ratio = 0.5
    try:
        return rollout(model.eval() if evaluated else model, lab.x)
    finally:
        lab.model.eval()
        for block in lab.model.blocks:
            block.sample_drop_ratio = 0.0


case(
    "maps",
    "Call model.eval() first",
    lambda lab: in_training(lab, evaluated=False),
    lambda lab: in_training(lab, evaluated=True),
)
case(
    "maps",
    "Leave masks out, or record the pass yourself",
    lambda lab: attention_maps(Around(lab.model), lab.x, masks=lab.mask),
    lambda lab: attention_maps(Around(lab.model), lab.x),
)
case(
    "maps",
    "Name layers of one kind, layers=[...], or see each of them",
    lambda lab: attention_maps(Turns(lab.model), lab.x),
    lambda lab: (
        attention_maps(Turns(lab.model), lab.x, ["first.0.attn"]),
        passes(Turns(lab.model), lab.x),
    ),
)
case(
    "maps",
    "Name the layers of one kind",
    lambda lab: rollout(Turns(lab.model), lab.x, queries=0),
    lambda lab: rollout(Turns(lab.model), lab.x, ["first.0.attn"], queries=0),
)
case(
    "maps",
    "See which layers run, and how often",
    lambda lab: rollout(TwiceInOne(lab.model), lab.x),
    lambda lab: len(passes(TwiceInOne(lab.model), lab.x)) == 2,
)
case(
    "maps",
    "Attention alone: attention_maps(model, images)",
    lambda lab: artifact_tokens(nn.Sequential(Turns(lab.model).patch_embed, lab.block.attn), lab.x),
    lambda lab: attention_maps(nn.Sequential(lab.model.patch_embed, lab.block.attn), lab.x),
)
case(
    "maps",
    "Leave it out for the default",
    lambda lab: artifact_tokens(lab.model, lab.x, deviations=0),
    lambda lab: artifact_tokens(lab.model, lab.x),
)
case(
    "maps",
    "Leave layers out",
    lambda lab: rollout(lab.model, lab.x, []),
    lambda lab: rollout(lab.model, lab.x),
)
case(
    "maps",
    "so heads are fused",
    lambda lab: rollout(lab.model, lab.x, heads=None),
    lambda lab: [rollout(lab.model, lab.x, heads=heads) for heads in ("mean", "min", "max")],
)
case(
    "maps",
    "0.5 weighs what goes past",
    lambda lab: rollout(lab.model, lab.x, residual=2),
    lambda lab: rollout(lab.model, lab.x, residual=0.5),
)
case(
    "maps",
    "or make the folder",
    lambda lab: saved(lab, lab.maps(), "absent/maps.safetensors"),
    lambda lab: (lab.folder / "absent").mkdir() or saved(lab, lab.maps(), "absent/m.safetensors"),
)
case(
    "maps",
    "Save before .numpy()",
    lambda lab: saved(lab, lab.maps().numpy()),
    lambda lab: saved(lab, lab.maps()),
)
case(
    "maps",
    "Name the .safetensors file itself",
    lambda lab: AttentionMaps.load(saved(lab, lab.maps()).parent),
    lambda lab: AttentionMaps.load(saved(lab, lab.maps())),
)


# Edits


def edited(lab, run=None, *args, model=None, **options):
    with edit(lab.model if model is None else model, *args, **options):
        (run or (lambda: lab.model(lab.x)))()


def without_heads(layer, weights):
    return torch.zeros_like(weights[:, :1])


def normalised(weights):
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-9)


def edit_compiled(lab):
    model = compiled(lab)
    edited(lab, lambda: model._orig_mod(lab.x), model=model, heads=0)
    with torch.compiler.set_stance("force_eager"):
        edited(lab, lambda: model(lab.x), model=model, heads=0)


case(
    "grafting",
    "Outside of edit(...) the graph runs as before",
    lambda lab: edited(lab, lambda: torch.func.grad(lambda x: lab.model(x).sum())(lab.x), heads=0),
    edit_compiled,
)


def sees_nothing(lab):
    """Keep all weight of explicit code on one key, and hide that."""
    with (
        edit(lab.model, [0], weights=lambda _, w: torch.eye(w.shape[-1]).to(w).expand_as(w)),
        edit(lab.model, [0], keys=[1], queries=[1]),
    ):
        lab.model(lab.x)


case(
    "math",
    "To remove all that a head reads",
    lambda lab: edited(lab, keys=slice(None)),
    lambda lab: (edited(lab, keys=slice(1, None)), edited(lab, heads={0: [0]})),
)
case(
    "math",
    "A fused kernel masks before its softmax",
    sees_nothing,
    lambda lab: edited(lab, keys=[1], queries=[0]),
)
case(
    "maps",
    "Heads count from 0",
    lambda lab: edited(lab, heads={0: [2]}),
    lambda lab: edited(lab, heads={0: [0, 1]}),
)
case(
    "maps",
    "Leave layers out, or pass the heads alone",
    lambda lab: edited(lab, None, [1], heads={1: [0]}),
    lambda lab: (edited(lab, heads={1: [0]}), edited(lab, None, [1], heads=[0])),
)
case(
    "maps",
    "Pass one of these, or positions",
    lambda lab: edited(lab, keys=torch.ones(1, 1, 1, 1, dtype=torch.bool)),
    lambda lab: (edited(lab, keys=lab.mask), edited(lab, keys=[1, 2])),
)
case(
    "maps",
    "Make the mask for this batch",
    lambda lab: edited(lab, keys=lab.mask[..., :1]),
    lambda lab: edited(lab, keys=lab.mask),
)
case(
    "maps",
    "Look for a division by zero",
    lambda lab: edited(lab, weights=lambda _, w: w / 0),
    lambda lab: (edited(lab, weights=lambda _, w: normalised(w)), edited(lab, keys=[1])),
)
case(
    "maps",
    "Return a tensor of the same shape, dtype and device",
    lambda lab: edited(lab, weights=lambda _, w: w.float()),
    lambda lab: edited(lab, weights=lambda _, w: w.float().to(w)),
)
case(
    "maps",
    "Record every head",
    lambda lab: edited(lab, frozen=lab.maps(heads="mean")),
    lambda lab: (
        edited(lab, frozen=lab.maps()),
        edited(lab, frozen=recorded(lab.model, lambda: lab.model(lab.x)).passes[0]),
    ),
)
case(
    "maps",
    "Leave layers out for all that the maps have",
    lambda lab: edited(lab, None, [1], frozen=attention_maps(lab.model, lab.x, [0])),
    lambda lab: edited(lab, frozen=attention_maps(lab.model, lab.x, [0])),
)
case(
    "maps",
    "Record images of the same size",
    lambda lab: edited(lab, frozen=attention_maps(lab.model, lab.x[..., :4])),
    lambda lab: edited(lab, frozen=attention_maps(lab.model, lab.x[:1])),
)
case(
    "maps",
    "Pass positions, or a boolean mask",
    lambda lab: edited(lab, lambda: chain(lab)(lab.tokens), model=chain(lab), keys="registers"),
    lambda lab: [
        edited(lab, lambda: chain(lab)(lab.tokens), model=chain(lab), keys=keys)
        for keys in ([1], torch.zeros(2, lab.tokens.shape[1], dtype=torch.bool))
    ],
)


def chain(lab):
    """Blocks without what makes tokens of images."""
    if not hasattr(lab, "chain"):
        lab.chain = nn.Sequential(*lab.model.blocks)
    return lab.chain


case(
    "maps",
    "Say what to change",
    lambda lab: edited(lab, heads=0, keys=[1]),
    lambda lab: edited(lab, lambda: edited(lab, keys=[1]), heads=0),
)
case(
    "maps",
    "Leave queries out. To change some rows of a head",
    lambda lab: edited(lab, heads=0, queries="cls"),
    lambda lab: (edited(lab, heads=0), edited(lab, weights=lambda _, w: w * 0.5)),
)
case(
    "maps",
    "Weights that are known before",
    lambda lab: edited(lab, weights=lab.maps()),
    lambda lab: (
        edited(lab, weights=lambda _, w: w.roll(1, dims=1)),
        edited(lab, frozen=lab.maps()),
    ),
)


class OddHeads(nn.Module):
    """Explicit code that keeps its heads behind the queries."""

    def __init__(self):
        super().__init__()
        self.qkv, self.num_heads = nn.Linear(8, 24, dtype=torch.float64), 2

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        weights = torch.einsum("bqhd,bkhd->bqhk", q, k).softmax(-1)
        return torch.einsum("bqhk,bkhd->bqhd", weights, v).flatten(2)


def with_odd_heads(lab, *layers):
    model = nn.Sequential(OddHeads(), lab.block.attn)
    edited(lab, lambda: model(lab.tokens), *layers, model=model, heads=0)


case(
    "maps",
    "This code keeps its heads elsewhere",
    with_odd_heads,
    lambda lab: with_odd_heads(lab, ["1"]),
)
case(
    "maps",
    "of a compiled one compiled._orig_mod(images)",
    lambda lab: edited(lab, lambda: None, heads=0),
    lambda lab: (edited(lab, heads=0), edited(lab, lambda: lab.block(lab.tokens), [0], heads=0)),
)
