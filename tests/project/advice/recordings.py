"""Advice about recordings, and what is made of maps."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import dinov2_attn
from dinov2_attn import artifact_tokens, attention_maps, record, rollout
from dinov2_attn.backbone.backbone import grafted_backbone
from dinov2_attn.maps.attention_maps import AttentionMaps
from tests.support import upstreams
from tests.support.advice import Table
from tests.support.compiling import compiles
from tests.support.recordings import Around
from tests.support.strategies import randomise

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
    "backbone",
    "Pass the module whose forward will run",
    lambda lab: recorded(lab.model.forward, lambda: lab.model(lab.x)),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x)),
)
case(
    "backbone",
    "Pass the one to record; the others may run too",
    lambda lab: recorded(nn.ModuleList([lab.model, copy.deepcopy(lab.model)]), lambda: None),
    lambda lab: recorded(lab.model, lambda: (lab.model(lab.x), copy.deepcopy(lab.model)(lab.x))),
)
case(
    "backbone",
    "Leave layers out for all",
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), []),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x)),
)


def attention_of_ones_own(lab):
    class Attention(type(lab.block.attn)):
        def forward(self, x):
            return super().forward(x)

    lab.block.attn.__class__ = Attention
    return lab.model


def recorded_when_installed(lab):
    model = attention_of_ones_own(lab)
    with dinov2_attn.install(model):
        return recorded(model, lambda: model(lab.x))


case(
    "backbone",
    "or install(model) with the live model, before recording",
    lambda lab: recorded(attention_of_ones_own(lab), lambda: lab.model(lab.x)),
    recorded_when_installed,
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
    "maps",
    "Correct prefix or grid",
    lambda lab: replace(lab.maps(), grid=(3, 3)).patch_maps(),
    lambda lab: replace(replace(lab.maps(), grid=(3, 3)), grid=(2, 3)).patch_maps(),
)
case(
    "maps",
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
    "pass the transformer itself",
    lambda lab: grafted_backbone(Around(lab.model)),
    lambda lab: dinov2_attn.install(lab.model) and grafted_backbone(Around(lab.model).inner),
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


class Twice(nn.Module):
    """A transformer that runs twice in a pass."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images) + self.inner(images.flip(-1))


def passes(model, images):
    return recorded(model, lambda: model(images)).passes


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
    lambda lab: rollout(Turns(lab.model), lab.x),
    lambda lab: rollout(Turns(lab.model), lab.x, ["first.0.attn"]),
)
case(
    "maps",
    "See which layers run, and how often",
    lambda lab: rollout(Twice(lab.model), lab.x),
    lambda lab: len(passes(Twice(lab.model), lab.x)) == 2,
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


def causal(lab, ask):
    """Ask a model whose blocks are causal, of the copy that has such blocks."""
    copied = upstreams.ANOMALIB
    with dinov2_attn.install(copied.package):
        for number, block in enumerate(lab.model.blocks):
            causal_block = randomise(copied.cls("CausalAttentionBlock")(8, num_heads=2), number)
            lab.model.blocks[number] = causal_block.to(lab.x.dtype).train(block.training)
        return ask(lab.model)


case(
    "grafting",
    "Use get_self_attention, whose weights include it",
    lambda lab: causal(lab, lambda model: rollout(model, lab.x)),
    lambda lab: causal(lab, lambda model: model.get_self_attention(lab.x)),
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
