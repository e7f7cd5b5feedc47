"""Advice of what is asked of a model: attention, recordings, maps and what is made of them."""

from __future__ import annotations

import copy

import torchvision
from torch import nn

import dinov2_attn
from dinov2_attn import attention_maps
from tests.project.advice.recordings import recorded
from tests.support.advice import Table
from tests.support.recordings import Around, build

CASES = Table()
case = CASES.add


# Selections

case(
    "math",
    "Leave heads out and select from dimension 1",
    lambda lab: lab.model.get_last_self_attention(lab.x, heads=0),
    lambda lab: lab.model.get_last_self_attention(lab.x)[:, 0],
)
case(
    "math",
    "Ask the model (get_self_attention, get_last_self_attention) or pass a slice",
    lambda lab: lab.block(lab.tokens, return_attention=True, queries="patches"),
    lambda lab: (
        lab.model.get_self_attention(lab.x, queries="patches"),
        lab.model.get_last_self_attention(lab.x, queries="patches"),
        lab.block(lab.tokens, return_attention=True, queries=slice(1, None)),
    ),
)
case(
    "math",
    "Pass an int or a sequence of ints",
    lambda lab: lab.maps(queries=1.5),
    lambda lab: (lab.maps(queries=1), lab.maps(queries=[1, 2])),
)
case(
    "math",
    "Check the spelling, or give positions",
    lambda lab: lab.maps(queries="patch"),
    lambda lab: (lab.maps(queries="patches"), lab.maps(queries=[1, 2])),
)
case(
    "math",
    "Positions count CLS first",
    lambda lab: lab.maps(queries=7),
    lambda lab: lab.maps(queries=6),
)
case(
    "math",
    "Count tokens: CLS",
    lambda lab: lab.maps(queries=slice(0, 4, 0)),
    lambda lab: lab.maps(queries=slice(0, 4)),
)

# Images and masks

case(
    "backbone",
    "images[None]",
    lambda lab: attention_maps(lab.model, lab.x[0]),
    lambda lab: attention_maps(lab.model, lab.x[0][None]),
)
case(
    "backbone",
    "torchvision.transforms.functional.normalize(",
    lambda lab: attention_maps(copy.deepcopy(lab.model).float(), lab.x.byte()),
    lambda lab: attention_maps(
        copy.deepcopy(lab.model).float(),
        torchvision.transforms.functional.normalize(
            lab.x.byte().float() / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        ),
    ),
)
case(
    "backbone",
    "images.movedim(-1, 1)",
    lambda lab: attention_maps(lab.model, lab.x.movedim(1, -1)),
    lambda lab: attention_maps(lab.model, lab.x.movedim(1, -1).movedim(-1, 1)),
)
case(
    "backbone",
    "images.repeat(1, ",
    lambda lab: attention_maps(lab.model, lab.x[:, :1]),
    lambda lab: attention_maps(lab.model, lab.x[:, :1].repeat(1, 3, 1, 1)),
)
case(
    "backbone",
    "images[:, :3]",
    lambda lab: attention_maps(lab.model, lab.x[:, [0, 1, 2, 2]]),
    lambda lab: attention_maps(lab.model, lab.x[:, [0, 1, 2, 2]][:, :3]),
)
case(
    "backbone",
    "images.mean(1, keepdim=True)",
    lambda lab: attention_maps(build(lab.upstream, in_chans=1), lab.x),
    lambda lab: attention_maps(build(lab.upstream, in_chans=1), lab.x.mean(1, keepdim=True)),
)
case(
    "backbone",
    "Build the model with in_chans=",
    lambda lab: attention_maps(lab.model, lab.x[:, [0, 1, 2, 2, 0]]),
    lambda lab: attention_maps(build(lab.upstream, in_chans=5), lab.x[:, [0, 1, 2, 2, 0]]),
)
case(
    "backbone",
    "Crop or resize",
    lambda lab: attention_maps(lab.model, lab.x[..., :5]),
    lambda lab: attention_maps(lab.model, lab.x[..., :4]),
)
case(
    "backbone",
    "Skip the call, or pass images",
    lambda lab: attention_maps(lab.model, []),
    lambda lab: attention_maps(lab.model, [lab.x]),
)
case(
    "backbone",
    "Pass None in the list",
    lambda lab: attention_maps(lab.model, [lab.x, lab.x], masks=[lab.mask.flatten(1)]),
    lambda lab: attention_maps(lab.model, [lab.x, lab.x], masks=[lab.mask.flatten(1), None]),
)
case(
    "backbone",
    "Flatten the mask grid row by row",
    lambda lab: attention_maps(lab.model, lab.x, masks=lab.mask),
    lambda lab: attention_maps(lab.model, lab.x, masks=lab.mask.flatten(1)),
)
case(
    "backbone",
    "masks.bool()",
    lambda lab: attention_maps(lab.model, lab.x, masks=lab.mask.flatten(1).int()),
    lambda lab: attention_maps(lab.model, lab.x, masks=lab.mask.flatten(1).int().bool()),
)
case(
    "math",
    "Blocks count from 0",
    lambda lab: lab.maps(layers=[3]),
    lambda lab: lab.maps(layers=[2]),
)
case(
    "math",
    "Pass a sequence to choose single blocks: [",
    lambda lab: lab.maps(layers=4),
    lambda lab: lab.maps(layers=[2]),
)

# Modules asked by themselves

case(
    "backbone",
    "Call the model instead if you have images, or add the batch dimension",
    lambda lab: lab.block(lab.tokens[0], return_attention=True),
    lambda lab: (
        lab.model(lab.x, return_attention=True),
        lab.block(lab.tokens[0][None], return_attention=True),
    ),
)
case(
    "grafting",
    "This class takes no other",
    lambda lab: lab.block.attn(lab.tokens, return_attn=True, mask=None),
    lambda lab: lab.block.attn(lab.tokens, return_attn=True),
)
case(
    "grafting",
    "Pass return_attn, return_attention, queries and heads by keyword",
    lambda lab: lab.block.attn(lab.tokens, None, None, "mean", return_attn=True),
    lambda lab: lab.block.attn(lab.tokens, heads="mean", return_attn=True),
)
case(
    "grafting",
    "Pass one tensor (B, N, C) or a list of them",
    lambda lab: lab.block(return_attention=True),
    lambda lab: (
        lab.block(lab.tokens, return_attention=True),
        lab.block([lab.tokens], return_attention=True),
    ),
)


class Dropping(Around):
    def forward(self, x, **kwargs):
        return self.inner(x)


class HandingOn(Around):
    def forward(self, x, **kwargs):
        return self.inner(x, **kwargs)


def around(lab, wrapper):
    lab.model.blocks[-1] = wrapper(lab.block)
    return lab.model.get_self_attention(lab.x)


case(
    "grafting",
    "Let the wrapper's forward pass **kwargs on",
    lambda lab: around(lab, Dropping),
    lambda lab: around(lab, HandingOn),
)


def of_ones_own(lab):
    """Give the model a block whose class nothing was installed on, and return the model."""

    class Block(type(lab.block)):
        def forward(self, x):
            return super().forward(x)

    lab.model.blocks[-1].__class__ = Block
    return lab.model


def installed(ask):
    def right(lab):
        model = of_ones_own(lab)
        with dinov2_attn.install(model):
            return ask(lab, model)

    return right


def asked(lab, model):
    return model.get_self_attention(lab.x)


case(
    "grafting",
    "Call dinov2_attn.install(model) with the live model",
    lambda lab: asked(lab, of_ones_own(lab)),
    installed(asked),
)


def listing(lab):
    """Give the model a forward_features that returns a list, and return the model."""
    if type(lab.model).__name__ == "Listing":
        return lab.model
    cls = type(lab.model)

    def forward_features(self, x, masks=None):
        return [cls.forward_features(self, x, masks)["x_prenorm"]]

    def forward(self, x):
        return self.forward_features(x)

    own = {"forward_features": forward_features, "forward": forward}
    lab.model.__class__ = type("Listing", (cls,), own)
    return lab.model


def asked_for_features(lab):
    with dinov2_attn.install(model := listing(lab)):
        return model.forward_features(lab.x, return_attention=True)


def asked_otherwise(lab):
    with dinov2_attn.install(model := listing(lab)):
        return model(lab.x, return_attention=True), model.get_self_attention(lab.x)


case(
    "grafting",
    "Call model(x, return_attention=True) or model.get_self_attention",
    asked_for_features,
    asked_otherwise,
)


# install


case(
    "grafting",
    'Call install(), install("some.vendored.package") or install(model)',
    lambda _: dinov2_attn.install(3),
    lambda lab: [
        dinov2_attn.install(target).__exit__() for target in (None, "some.vendored", lab.model)
    ],
)
case(
    "grafting",
    "record(model) needs no install: it finds the attention of any model",
    lambda _: dinov2_attn.install("json"),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x)),
)
case(
    "grafting",
    "Pass DINOv2 itself or a model that contains it",
    lambda lab: dinov2_attn.install(lab.block.mlp),
    lambda lab: [
        dinov2_attn.install(target).__exit__() for target in (lab.model, Around(lab.model))
    ],
)


def patched_on_top(lab, *, taken_off):
    cls = next(cls for cls in type(lab.block).__mro__ if cls.__name__ == "Block")
    ours = cls.forward
    cls.forward = lambda self, *args: ours(self, *args)
    try:
        if taken_off:
            cls.forward = ours
        dinov2_attn.uninstall()
    finally:
        if not taken_off:
            cls.forward = ours


case(
    "grafting",
    "Take that patch off first, then call uninstall() again",
    lambda lab: patched_on_top(lab, taken_off=False),
    lambda lab: patched_on_top(lab, taken_off=True),
)

# Models as a type checker sees them

case(
    "grafting",
    "Pass the model, not its output",
    lambda lab: dinov2_attn.grafted(lab.model(lab.x)),
    lambda lab: dinov2_attn.grafted(lab.model).get_last_self_attention(lab.x),
)


def not_installed(lab):
    dinov2_attn.uninstall()
    return dinov2_attn.grafted(lab.model)


def then_installed(lab):
    dinov2_attn.install(lab.model)
    return dinov2_attn.grafted(lab.model).get_last_self_attention(lab.x)


case("grafting", "Call dinov2_attn.install(model) first", not_installed, then_installed)
case(
    "grafting",
    "Pass the one to ask",
    lambda lab: dinov2_attn.grafted(nn.ModuleList([lab.model, copy.deepcopy(lab.model)])),
    lambda lab: dinov2_attn.grafted(lab.model).get_last_self_attention(lab.x),
)


def partial(lab):
    """Give the model a forward pass that runs its first block only."""

    class Partial(type(lab.model)):
        def forward_features(self, x, masks=None):
            x = self.blocks[0](self.prepare_tokens_with_masks(x, masks))
            return {"x_norm_clstoken": self.norm(x)[:, 0]}

    lab.model.__class__ = Partial
    return lab.model


case(
    "grafting",
    "use record(model, [0, ...]) with those",
    lambda lab: partial(lab)(lab.x, return_attention=True),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), [0]),
)
