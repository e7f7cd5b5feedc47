"""Advice of test-time registers: neurons, models and passes."""

from __future__ import annotations

import torch
from torch import nn

from dinov2_attn import add_registers, artifact_tokens, edit, find_register_neurons
from tests.support import upstreams
from tests.support.advice import Table
from tests.support.planted_registers import marked_images, plant
from tests.support.recordings import build

CASES = Table()
case = CASES.add

GRID, PLACES = (6, 7), [(1, 5), (4, 0)]


def newer(lab, **options):
    """Return a model of newer code, in which two neurons of block 1 make artifact tokens."""
    del lab
    model = build(upstreams.LIGHTLY, depth=4, **options)
    plant(model, 1, [3, 5], images(model), PLACES)
    return model


def images(model):
    return marked_images(model, GRID, PLACES)


def added(model, neurons=None, run=None, **options):
    with add_registers(model, {1: [3, 5]} if neurons is None else neurons, **options):
        (run or (lambda: model(images(model))))()


def found(model, **options):
    return find_register_neurons(model, images(model), 2, **options)


case(
    "maps",
    "Leave it out for one register",
    lambda lab: added(newer(lab), count=0),
    lambda lab: added(newer(lab)),
)
case(
    "maps",
    "or a mapping such as {3: [17, 4]}",
    lambda lab: added(newer(lab), [3]),
    lambda lab: (added(newer(lab), found(newer(lab))), added(newer(lab), {3: [17, 4]})),
)
case(
    "maps",
    "Neurons are the inputs of the last linear layer of the MLP, counted from 0",
    lambda lab: added(newer(lab), {0: [32]}),
    lambda lab: added(newer(lab), {0: [newer(lab).blocks[0].mlp.fc2.in_features - 1]}),
)
case(
    "maps",
    "scripted or replicated one, and of a compiled one compiled._orig_mod(images).",
    lambda lab: added(newer(lab), run=lambda: None),
    lambda lab: added(newer(lab)),
)
case(
    "maps",
    "Pass what artifact_tokens(model, images) returns for the same images",
    lambda lab: found(newer(lab), artifacts=artifact_tokens(newer(lab), images(newer(lab))[:1])),
    lambda lab: found(newer(lab), artifacts=artifact_tokens(newer(lab), images(newer(lab)))),
)
case(
    "maps",
    "Small models have no artifact tokens: then no registers are needed",
    lambda lab: find_register_neurons(newer(lab), images(newer(lab))[..., :8] * 0.01),
    lambda lab: found(
        newer(lab), artifacts=artifact_tokens(newer(lab), images(newer(lab)), layer=1, floor=1.5)
    ),
)
case(
    "maps",
    "or search more layers: layers=range(...)",
    lambda lab: find_register_neurons(newer(lab), images(newer(lab)), 10**4),
    lambda lab: (
        find_register_neurons(newer(lab), images(newer(lab))),
        find_register_neurons(newer(lab), images(newer(lab)), 100, layers=range(4)),
    ),
)
case(
    "grafting",
    "newer code, and load the same weights",
    lambda lab: added(lab.model),
    lambda lab: added(newer(lab)),
)
case(
    "grafting",
    "Give all neurons to one block",
    lambda lab: nested(newer(lab)),
    lambda lab: added(newer(lab), {0: [1], 1: [2]}),
)


def nested(model):
    added(model, run=lambda: added(model))


def with_other_tokens(lab):
    cls = type(newer(lab))

    class Longer(cls):
        def prepare_tokens_with_masks(self, x, masks=None):
            tokens = super().prepare_tokens_with_masks(x, masks)
            return torch.cat([tokens, tokens[:, :1]], 1)

    model = newer(lab)
    model.__class__ = Longer
    return model


def hidden(model):
    with edit(model, keys=artifact_tokens(newer(None), images(model))):
        model(images(model))


case(
    "grafting",
    "Tokens cannot be added to such a model",
    lambda lab: added(with_other_tokens(lab)),
    lambda lab: hidden(newer(lab)),
)
case(
    "grafting",
    "in place of a list of batches. Use model.eval()",
    lambda lab: in_two_dimensions(newer(lab)),
    lambda lab: added(newer(lab).eval()),
)


def in_two_dimensions(model):
    mlp = model.blocks[1].mlp
    added(model, run=lambda: mlp(torch.ones(3, 8, dtype=torch.float64)))


def without_kernel(lab):
    """Return a model whose MLP multiplies by its last weight in its own way."""
    cls = type(newer(lab).blocks[1].mlp)

    class Fused(cls):
        def forward(self, x):
            return self.act(self.fc1(x)) @ self.fc2.weight.T + self.fc2.bias

    model = newer(lab)
    model.blocks[1].mlp.__class__ = Fused
    return model


case(
    "grafting",
    "set XFORMERS_DISABLED=1 before DINOv2",
    lambda lab: added(without_kernel(lab)),
    lambda lab: added(newer(lab)),
)
case(
    "grafting",
    'under torch.compiler.set_stance("force_eager").',
    lambda lab: exported(newer(lab)),
    lambda lab: added(newer(lab)),
)


def exported(model):
    added(model, run=lambda: torch.export.export(model, (images(model),)))


case(
    "backbone",
    "Merge adapters such as LoRA into its weights first",
    lambda lab: added(adapted(lab)),
    lambda lab: added(newer(lab)),
)


def adapted(lab):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.mean()

    model = newer(lab)
    model.blocks[0].mlp.fc2 = Adapted(32, 8).double()
    return model
