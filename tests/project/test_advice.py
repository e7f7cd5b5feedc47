"""Every advice that an error gives is followed once, and leads to a call that works.

``CASES`` holds those that are followed, ``NOT_FOLLOWED`` those that are not, with the reason.
A new error needs an entry in one of them: a few words of its hint are enough.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import dinov2_attn
from dinov2_attn import artifact_tokens, attention_maps, load_checkpoint, record, rollout, viz
from dinov2_attn.apps.explorer.write import write_page
from dinov2_attn.apps.viz.tokens import as_texts, check_queries, resolve
from dinov2_attn.maps.attention_maps import AttentionMaps
from tests.support.advice import Case, hints
from tests.support.compiling import compiles
from tests.support.recordings import IMAGES, Around, build

CASES: list[Case] = []


def case(module, snippet, wrong, right):
    CASES.append(Case(f"{module}.py", snippet, wrong, right))


@pytest.fixture
def lab(first, tmp_path):
    """A model, images, tokens, maps and a folder."""
    dinov2_attn.install()
    model = build(first)
    tokens = model.prepare_tokens_with_masks(IMAGES)
    return SimpleNamespace(
        upstream=first,
        model=model,
        x=IMAGES,
        tokens=tokens,
        block=model.blocks[0],
        maps=lambda **asked: attention_maps(model, IMAGES, **asked),
        mask=torch.zeros(2, 2, 3, dtype=torch.bool),
        photograph=np.zeros((4, 6, 3), np.uint8),
        folder=tmp_path,
    )


# Selections

case(
    "math/attention",
    "Leave heads out and select from dimension 1",
    lambda lab: lab.model.get_last_self_attention(lab.x, heads=0),
    lambda lab: lab.model.get_last_self_attention(lab.x)[:, 0],
)
case(
    "math/selection",
    "Ask the model (get_self_attention, get_last_self_attention) or pass a slice",
    lambda lab: lab.block(lab.tokens, return_attention=True, queries="patches"),
    lambda lab: (
        lab.model.get_self_attention(lab.x, queries="patches"),
        lab.model.get_last_self_attention(lab.x, queries="patches"),
        lab.block(lab.tokens, return_attention=True, queries=slice(1, None)),
    ),
)
case(
    "math/selection",
    "Pass an int or a sequence of ints",
    lambda lab: lab.maps(queries=1.5),
    lambda lab: (lab.maps(queries=1), lab.maps(queries=[1, 2])),
)
case(
    "math/selection",
    "Check the spelling, or give positions",
    lambda lab: lab.maps(queries="patch"),
    lambda lab: (lab.maps(queries="patches"), lab.maps(queries=[1, 2])),
)
case(
    "math/selection",
    "Positions count CLS first",
    lambda lab: lab.maps(queries=7),
    lambda lab: lab.maps(queries=6),
)
case(
    "math/selection",
    "Count tokens: CLS",
    lambda lab: lab.maps(queries=slice(0, 4, 0)),
    lambda lab: lab.maps(queries=slice(0, 4)),
)

# Images and masks

case(
    "backbone/validation",
    "images[None]",
    lambda lab: attention_maps(lab.model, lab.x[0]),
    lambda lab: attention_maps(lab.model, lab.x[0][None]),
)
case(
    "backbone/validation",
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
    "backbone/validation",
    "images.movedim(-1, 1)",
    lambda lab: attention_maps(lab.model, lab.x.movedim(1, -1)),
    lambda lab: attention_maps(lab.model, lab.x.movedim(1, -1).movedim(-1, 1)),
)
case(
    "backbone/validation",
    "images.repeat(1, 3, 1, 1)",
    lambda lab: attention_maps(lab.model, lab.x[:, :1]),
    lambda lab: attention_maps(lab.model, lab.x[:, :1].repeat(1, 3, 1, 1)),
)
case(
    "backbone/validation",
    "images[:, :3]",
    lambda lab: attention_maps(lab.model, lab.x[:, [0, 1, 2, 2]]),
    lambda lab: attention_maps(lab.model, lab.x[:, [0, 1, 2, 2]][:, :3]),
)
case(
    "backbone/validation",
    "images.mean(1, keepdim=True)",
    lambda lab: attention_maps(build(lab.upstream, in_chans=1), lab.x),
    lambda lab: attention_maps(build(lab.upstream, in_chans=1), lab.x.mean(1, keepdim=True)),
)
case(
    "backbone/validation",
    "Build the model with in_chans=",
    lambda lab: attention_maps(lab.model, lab.x[:, [0, 1, 2, 2, 0]]),
    lambda lab: attention_maps(build(lab.upstream, in_chans=5), lab.x[:, [0, 1, 2, 2, 0]]),
)
case(
    "backbone/validation",
    "Crop or resize",
    lambda lab: attention_maps(lab.model, lab.x[..., :5]),
    lambda lab: attention_maps(lab.model, lab.x[..., :4]),
)
case(
    "backbone/validation",
    "Skip the call, or pass images",
    lambda lab: attention_maps(lab.model, []),
    lambda lab: attention_maps(lab.model, [lab.x]),
)
case(
    "backbone/validation",
    "Pass None in the list",
    lambda lab: attention_maps(lab.model, [lab.x, lab.x], masks=[lab.mask.flatten(1)]),
    lambda lab: attention_maps(lab.model, [lab.x, lab.x], masks=[lab.mask.flatten(1), None]),
)
case(
    "backbone/validation",
    "Flatten the mask grid row by row",
    lambda lab: attention_maps(lab.model, lab.x, masks=lab.mask),
    lambda lab: attention_maps(lab.model, lab.x, masks=lab.mask.flatten(1)),
)
case(
    "backbone/validation",
    "masks.bool()",
    lambda lab: attention_maps(lab.model, lab.x, masks=lab.mask.flatten(1).int()),
    lambda lab: attention_maps(lab.model, lab.x, masks=lab.mask.flatten(1).int().bool()),
)
case(
    "backbone/validation",
    "Blocks count from 0",
    lambda lab: lab.maps(n=[3]),
    lambda lab: lab.maps(n=[2]),
)
case(
    "backbone/validation",
    "Pass a sequence to choose single blocks: n=[",
    lambda lab: lab.maps(n=4),
    lambda lab: lab.maps(n=[2]),
)

# Modules asked by themselves

case(
    "grafting/compute",
    "Call the model instead if you have images, or add the batch dimension",
    lambda lab: lab.block(lab.tokens[0], return_attention=True),
    lambda lab: lab.block(lab.tokens[0][None], return_attention=True),
)
case(
    "grafting/modules",
    "This class takes no other",
    lambda lab: lab.block.attn(lab.tokens, return_attn=True, mask=None),
    lambda lab: lab.block.attn(lab.tokens, return_attn=True),
)
case(
    "grafting/modules",
    "Pass return_attn, return_attention, queries and heads by keyword",
    lambda lab: lab.block.attn(lab.tokens, None, None, "mean", return_attn=True),
    lambda lab: lab.block.attn(lab.tokens, heads="mean", return_attn=True),
)
case(
    "grafting/modules",
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
    lab.model.blocks[0] = wrapper(lab.block)
    return lab.model.get_self_attention(lab.x)


case(
    "grafting/modules",
    "Let the wrapper's forward pass **kwargs on",
    lambda lab: around(lab, Dropping),
    lambda lab: around(lab, HandingOn),
)


def of_ones_own(lab):
    """Give the model a block whose class nothing was installed on, and return the model."""

    class Block(type(lab.block)):
        def forward(self, x):
            return super().forward(x)

    lab.model.blocks[0].__class__ = Block
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
    "grafting/modules",
    "Call dinov2_attn.install(model) with the live model",
    lambda lab: asked(lab, of_ones_own(lab)),
    installed(asked),
)


def recorded(model, run, *args, **options):
    with record(model, *args, **options) as recording:
        run()
    return recording


# install


case(
    "grafting/api",
    'Call install(), install("some.vendored.package") or install(model)',
    lambda _: dinov2_attn.install(3),
    lambda lab: [
        dinov2_attn.install(target).__exit__() for target in (None, "some.vendored", lab.model)
    ],
)
case(
    "grafting/api",
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
    "grafting/registry",
    "Take that patch off first, then call uninstall() again",
    lambda lab: patched_on_top(lab, taken_off=False),
    lambda lab: patched_on_top(lab, taken_off=True),
)

# Recordings


def twice(lab):
    with record(lab.model) as recording:
        lab.model(lab.x)
        lab.model(lab.x)
    return recording


case(
    "maps/recording",
    "Each forward pass is an entry of .passes",
    lambda lab: twice(lab).weights,
    lambda lab: [one.weights for one in twice(lab).passes],
)
case(
    "maps/record",
    "lambda layer, weights: weights.mean(1).cpu()",
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), reduce="mean"),
    lambda lab: recorded(
        lab.model,
        lambda: lab.model(lab.x),
        reduce=lambda layer, weights: weights.mean(1).cpu(),
    ),
)
case(
    "maps/record",
    "Run the model inside the block, in the same thread",
    lambda lab: recorded(lab.model, lambda: None),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x)),
)
case(
    "backbone/backbone",
    "Pass the module whose forward will run",
    lambda lab: recorded(lab.model.forward, lambda: lab.model(lab.x)),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x)),
)
case(
    "backbone/backbone",
    "Pass the one to record; the others may run too",
    lambda lab: recorded(nn.ModuleList([lab.model, copy.deepcopy(lab.model)]), lambda: None),
    lambda lab: recorded(lab.model, lambda: (lab.model(lab.x), copy.deepcopy(lab.model)(lab.x))),
)
case(
    "backbone/backbone",
    "Leave n out for all",
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
    "backbone/backbone",
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
    "grafting/channel",
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
    "maps/attention_maps",
    "dataclasses.replace(maps, grid=(h, w))",
    lambda lab: of_tokens(lab).patch_maps(),
    lambda lab: replace(of_tokens(lab).passes[0], grid=(2, 3)).patch_maps(),
)
case(
    "maps/attention_maps",
    "Correct prefix or grid",
    lambda lab: replace(lab.maps(), grid=(3, 3)).patch_maps(),
    lambda lab: replace(replace(lab.maps(), grid=(3, 3)), grid=(2, 3)).patch_maps(),
)
case(
    "maps/attention_maps",
    "or keep the columns in reduce",
    lambda lab: recorded(
        lab.model, lambda: lab.model(lab.x), reduce=lambda _, weights: weights[..., 1:]
    ).patch_maps(),
    lambda lab: recorded(
        lab.model, lambda: lab.model(lab.x), reduce=lambda _, weights: weights.mean(-2)
    ).patch_maps(),
)
case(
    "backbone/backbone",
    "pass the transformer itself",
    lambda lab: attention_maps(Around(lab.model), lab.x),
    lambda lab: dinov2_attn.install(lab.model) and attention_maps(Around(lab.model).inner, lab.x),
)
case(
    "maps/outliers",
    "Leave it out for the default",
    lambda lab: artifact_tokens(lab.model, lab.x, deviations=0),
    lambda lab: artifact_tokens(lab.model, lab.x),
)
case(
    "maps/rollout",
    "Leave layers out",
    lambda lab: rollout(lab.model, lab.x, []),
    lambda lab: rollout(lab.model, lab.x),
)
case(
    "maps/rollout",
    "so heads are fused",
    lambda lab: rollout(lab.model, lab.x, heads=None),
    lambda lab: [rollout(lab.model, lab.x, heads=heads) for heads in ("mean", "min", "max")],
)
case(
    "maps/rollout",
    "0.5 weighs what goes past",
    lambda lab: rollout(lab.model, lab.x, residual=2),
    lambda lab: rollout(lab.model, lab.x, residual=0.5),
)
case(
    "maps/_storage",
    "or make the folder",
    lambda lab: saved(lab, lab.maps(), "absent/maps.safetensors"),
    lambda lab: (lab.folder / "absent").mkdir() or saved(lab, lab.maps(), "absent/m.safetensors"),
)
case(
    "maps/_storage",
    "Save before .numpy()",
    lambda lab: saved(lab, lab.maps().numpy()),
    lambda lab: saved(lab, lab.maps()),
)
case(
    "maps/_storage",
    "let reduce return tensors",
    lambda lab: saved(lab, recorded(lab.model, lambda: lab.model(lab.x), reduce=lambda _, w: 1.0)),
    lambda lab: saved(
        lab, recorded(lab.model, lambda: lab.model(lab.x), reduce=lambda _, w: w.sum())
    ),
)
case(
    "maps/_storage",
    "Name the .safetensors file itself",
    lambda lab: AttentionMaps.load(saved(lab, lab.maps()).parent),
    lambda lab: AttentionMaps.load(saved(lab, lab.maps())),
)
case(
    "apps/weights/checkpoints",
    "Call model.to_empty(device='cpu') first",
    lambda lab: load_checkpoint(copy.deepcopy(lab.model).to("meta"), weights_of(lab)),
    lambda lab: load_checkpoint(
        copy.deepcopy(lab.model).to("meta").to_empty(device="cpu"), weights_of(lab)
    ),
)


def weights_of(lab):
    torch.save(lab.model.state_dict(), lab.folder / "weights.pth")
    return lab.folder / "weights.pth"


# Pictures


def drawn(lab, maps, **options):
    return viz.plot(maps, **options).figure


case(
    "apps/viz/rows",
    "Leave heads out of attention_maps",
    lambda lab: drawn(lab, lab.maps(heads="mean"), head=0),
    lambda lab: drawn(lab, lab.maps(), head=0),
)
case(
    "apps/viz/rows",
    "Ask attention_maps or record for it by queries=",
    lambda lab: drawn(lab, lab.maps(queries="cls"), query=(0, 1)),
    lambda lab: drawn(lab, lab.maps(queries=[0, 2]), query=(0, 1)),
)
case(
    "apps/viz/rows",
    "layers=None takes all",
    lambda lab: drawn(lab, lab.maps(layers=1), layer=0),
    lambda lab: drawn(lab, lab.maps(layers=None), layer=0),
)
case(
    "apps/viz/rows",
    "Images count from 0",
    lambda lab: drawn(lab, lab.maps(), sample=2),
    lambda lab: drawn(lab, lab.maps(), sample=1),
)
case(
    "apps/viz/rows",
    "Give the number of the image.",
    lambda lab: drawn(lab, lab.maps(), sample=(0, 1)),
    lambda lab: drawn(lab, lab.maps(), sample=1),
)
case(
    "apps/viz/rows",
    "draw one of them, such as maps[0]",
    lambda lab: drawn(lab, attention_maps(lab.model, [lab.x])),
    lambda lab: drawn(lab, attention_maps(lab.model, [lab.x])[0]),
)
case(
    "apps/viz/rows",
    "Draw what attention_maps returns, without reduce",
    lambda lab: drawn(
        lab,
        recorded(lab.model, lambda: lab.model(lab.x), reduce=lambda _, w: w[0, 0, 0]),
    ),
    lambda lab: drawn(lab, recorded(lab.model, lambda: lab.model(lab.x))),
)
case(
    "apps/viz/captions",
    "Pass what artifact_tokens returned for the same batch",
    lambda lab: drawn(lab, lab.maps(), sample=1, artifacts=artifact_tokens(lab.model, lab.x[:1])),
    lambda lab: drawn(lab, lab.maps(), sample=1, artifacts=artifact_tokens(lab.model, lab.x)),
)
case(
    "apps/viz/style",
    "Check the spelling",
    lambda lab: viz.Style(interpolation="nearst"),
    lambda lab: drawn(lab, lab.maps(), style=viz.Style(interpolation="nearest")),
)
case(
    "apps/viz/style",
    "Try 0.5",
    lambda lab: viz.Style(alpha=2),
    lambda lab: drawn(lab, lab.maps(), style=viz.Style(alpha=0.5)),
)
case(
    "apps/viz/saving",
    "Rename it",
    lambda lab: viz.save(drawn(lab, lab.maps()), lab.folder / "map.bmp"),
    lambda lab: viz.save(drawn(lab, lab.maps()), lab.folder / "map.png"),
)
case(
    "apps/viz/saving",
    "Create its folder, or give another path",
    lambda lab: viz.save(drawn(lab, lab.maps()), lab.folder / "absent" / "map.png"),
    lambda lab: (
        (lab.folder / "absent").mkdir()
        or viz.save(drawn(lab, lab.maps()), lab.folder / "absent" / "map.png")
    ),
)
case(
    "apps/viz/pixels",
    "Put the channels last",
    lambda lab: drawn(lab, lab.maps(), image=lab.photograph.transpose(2, 0, 1)),
    lambda lab: drawn(lab, lab.maps(), image=lab.photograph),
)
case(
    "apps/viz/tokens",
    "Registers count from 1, rows and columns of patches from 0",
    lambda lab: drawn(lab, lab.maps(), query="first"),
    lambda lab: drawn(lab, lab.maps(), query="0,0"),
)
case(
    "apps/viz/tokens",
    "Ask for cls, or for a patch by ROW,COL",
    lambda lab: drawn(lab, lab.maps(), query="register:1"),
    lambda lab: [drawn(lab, lab.maps(), query=query) for query in ("cls", "1,2")],
)
case(
    "apps/viz/tokens",
    "Give two whole numbers",
    lambda lab: drawn(lab, lab.maps(), query=(1, 2, 3)),
    lambda lab: drawn(lab, lab.maps(), query=(1, 2)),
)
case(
    "apps/viz/tokens",
    "Rows go from 0 to ",
    lambda lab: drawn(lab, lab.maps(), query=(2, 0)),
    lambda lab: drawn(lab, lab.maps(), query=(1, 2)),
)
case(
    "apps/viz/tokens",
    "Leave it out for CLS",
    lambda lab: as_texts([]),
    lambda lab: as_texts("cls"),
)
case(
    "apps/viz/tokens",
    "Ask for cls, patches or all",
    lambda lab: check_queries(["registers"], 0),
    lambda lab: check_queries(["cls", "patches", "all"], 0),
)
case(
    "apps/viz/tokens",
    "Positions count CLS first",
    lambda lab: resolve(["#7:"], 1, (2, 3)),
    lambda lab: resolve(["#6:"], 1, (2, 3)),
)


def page(lab, maps=None, **options):
    picture = options.pop("picture", lab.photograph)
    return write_page(lab.folder / "page.html", picture, maps or lab.maps(), **options)


case(
    "apps/explorer/content",
    "25 is the default",
    lambda lab: page(lab, max_mb=0),
    lambda lab: page(lab, max_mb=25),
)
case(
    "apps/explorer/content",
    "Pass the .picture of the LoadedImage",
    lambda lab: page(lab, picture=lab.photograph[:3]),
    lambda lab: page(lab),
)
case(
    "apps/explorer/write",
    "pass one of them, such as maps[0]",
    lambda lab: page(lab, attention_maps(lab.model, [lab.x])),
    lambda lab: page(lab, attention_maps(lab.model, [lab.x])[0]),
)
case(
    "apps/explorer/write",
    "Pass the maps of one batch",
    lambda lab: page(
        lab, recorded(lab.model, lambda: lab.model(lab.x), reduce=lambda _, w: w[0, 0, 0])
    ),
    lambda lab: page(lab, recorded(lab.model, lambda: lab.model(lab.x))),
)
case(
    "apps/explorer/write",
    "One page shows one image",
    lambda lab: page(lab, sample=2),
    lambda lab: page(lab, sample=1),
)

# What is not followed here, by module and snippet, with the reason.

LATER = "not followed yet"
NOTHING_TO_DO = "names no call, option or command: this cannot be had"
TABLE = {
    "needs xFormers in the process: test_biases and test_nested follow it": {
        "math/bias": ("",),
        "kernels/xformers": ("",),
    },
    "needs a network or a package index": {
        "proof/verify/git": ("",),
        "apps/weights/source": ("",),
        "_download": ("",),
    },
    "needs an environment without the library": {
        "_optional": ("pip install",),
        "proof/verify/proof": ("pip install",),
        "apps/viz/saving": ("Install it (apt install ffmpeg", "or install an ffmpeg with H.264"),
    },
    NOTHING_TO_DO: {
        "grafting/transaction": ("This class is not supported",),
        "backbone/contract": ("so nothing was grafted", "This copy was patched by hand"),
        "backbone/proof": ("so nothing was grafted",),
        "backbone/backbone": ("Weights of shared modules cannot be told apart",),
        "grafting/compute": ("Use get_self_attention, whose weights include it",),
    },
    "whether a hook is seen differs from torch to torch: test_record_compiled asks": {
        "grafting/channel": ("Where qkv itself was compiled",),
    },
    "needs a copy that upstream has renamed": {"grafting/targets": ("Upstream moved",)},
    LATER: {
        "apps/extraction/decode": ("",),
        "apps/extraction/pictured": ("",),
        "apps/extraction/sources": ("",),
        "apps/viz/decoding": ("",),
        "apps/viz/opening": ("",),
        "apps/viz/ranges": ("",),
        "apps/viz/reading": ("",),
        "apps/weights/files": ("",),
        "apps/weights/config_files": ("",),
        "apps/viz/pixels": ("Convert to uint8", "Replace them.", "Divide it by the value of white"),
        "apps/cli/demo": ("",),
        "apps/cli/explore": ("",),
        "apps/cli/heatmap": ("",),
        "apps/cli/model_options": ("",),
        "apps/cli/plot_options": ("",),
        "apps/cli/image_options": ("",),
        "apps/cli/verify": ("",),
        "apps/extraction/extract": ("",),
        "apps/extraction/items": ("",),
        "apps/extraction/job": ("",),
        "apps/extraction/layout": ("",),
        "apps/extraction/options": ("",),
        "apps/extraction/read": ("",),
        "apps/extraction/worker": ("",),
        "apps/extraction/shards": ("",),
        "apps/demo/load": ("",),
        "_files": ("",),
        "apps/viz/images": ("",),
        "apps/explorer/budget": ("",),
        "apps/explorer/quantise": ("",),
        "apps/explorer/write": ("Ask all layers for the same queries and heads",),
        "apps/viz/inference": ("",),
        "apps/viz/tokens": ("Registers count from 1.",),
        "grafting/models": ("and do so before compiling it",),
        "apps/weights/architecture": ("",),
        "apps/weights/checkpoints": (
            "Pass its state_dict()",
            "Build the model",
            "build that in place of",
        ),
        "apps/weights/layouts": ("",),
        "apps/weights/models": ("",),
        "apps/weights/reading": ("",),
        "proof/verify/sources": ("",),
    },
}
NOT_FOLLOWED = [
    (f"{module}.py", snippet)
    for modules in TABLE.values()
    for module, snippets in modules.items()
    for snippet in snippets
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("one", CASES, ids=str)
def test_the_advice_leads_to_a_call_that_works(lab, one):
    with pytest.raises(dinov2_attn.Dinov2AttnError) as caught:
        one.wrong(lab)
    *_, advice = caught.value.args
    assert one.snippet in advice
    assert one.right(lab) is not False


def test_every_error_is_followed_or_says_why_not():
    known = [(one.module, one.snippet) for one in CASES] + NOT_FOLLOWED
    missing = [
        str(hint)
        for hint in hints()
        if not any(hint.module == module and words(snippet, hint) for module, snippet in known)
    ]
    assert not missing, "\n".join(missing)


def test_no_entry_outlives_its_error():
    every = list(hints())
    assert len(every) > 150
    stale = [
        (module, snippet)
        for module, snippet in NOT_FOLLOWED + [(one.module, one.snippet) for one in CASES]
        if not any(hint.module == module and words(snippet, hint) for hint in every)
    ]
    assert not stale


def words(snippet, hint):
    """Say whether ``snippet`` is of ``hint``: numbers in it are often put in when it is raised."""
    return any(piece in hint.text for piece in (snippet, snippet[:16]))
