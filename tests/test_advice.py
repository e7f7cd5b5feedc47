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
from advice import Case, hints
from compiling import compiles
from dinov2_attn import artifact_tokens, attention_maps, load_checkpoint, record, rollout, show
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.show.page.write import write_page
from recordings import IMAGES, Around, build

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
    "attention",
    "Leave heads out and select from dimension 1",
    lambda lab: lab.model.get_last_self_attention(lab.x, heads=0),
    lambda lab: lab.model.get_last_self_attention(lab.x)[:, 0],
)
case(
    "queries",
    "Ask the model (get_self_attention, get_last_self_attention) or pass a slice",
    lambda lab: lab.block(lab.tokens, return_attention=True, queries="patches"),
    lambda lab: (
        lab.model.get_self_attention(lab.x, queries="patches"),
        lab.model.get_last_self_attention(lab.x, queries="patches"),
        lab.block(lab.tokens, return_attention=True, queries=slice(1, None)),
    ),
)
case(
    "queries",
    "Pass an int or a sequence of ints",
    lambda lab: lab.maps(queries=1.5),
    lambda lab: (lab.maps(queries=1), lab.maps(queries=[1, 2])),
)
case(
    "queries",
    "Check the spelling, or give positions",
    lambda lab: lab.maps(queries="patch"),
    lambda lab: (lab.maps(queries="patches"), lab.maps(queries=[1, 2])),
)
case(
    "queries",
    "Positions count CLS first",
    lambda lab: lab.maps(queries=7),
    lambda lab: lab.maps(queries=6),
)
case(
    "queries",
    "Count tokens: CLS",
    lambda lab: lab.maps(queries=slice(0, 4, 0)),
    lambda lab: lab.maps(queries=slice(0, 4)),
)

# Images and masks

case(
    "surgery/inputs",
    "images[None]",
    lambda lab: attention_maps(lab.model, lab.x[0]),
    lambda lab: attention_maps(lab.model, lab.x[0][None]),
)
case(
    "surgery/inputs",
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
    "surgery/inputs",
    "images.movedim(-1, 1)",
    lambda lab: attention_maps(lab.model, lab.x.movedim(1, -1)),
    lambda lab: attention_maps(lab.model, lab.x.movedim(1, -1).movedim(-1, 1)),
)
case(
    "surgery/inputs",
    "images.repeat(1, 3, 1, 1)",
    lambda lab: attention_maps(lab.model, lab.x[:, :1]),
    lambda lab: attention_maps(lab.model, lab.x[:, :1].repeat(1, 3, 1, 1)),
)
case(
    "surgery/inputs",
    "images[:, :3]",
    lambda lab: attention_maps(lab.model, lab.x[:, [0, 1, 2, 2]]),
    lambda lab: attention_maps(lab.model, lab.x[:, [0, 1, 2, 2]][:, :3]),
)
case(
    "surgery/inputs",
    "images.mean(1, keepdim=True)",
    lambda lab: attention_maps(build(lab.upstream, in_chans=1), lab.x),
    lambda lab: attention_maps(build(lab.upstream, in_chans=1), lab.x.mean(1, keepdim=True)),
)
case(
    "surgery/inputs",
    "Build the model with in_chans=",
    lambda lab: attention_maps(lab.model, lab.x[:, [0, 1, 2, 2, 0]]),
    lambda lab: attention_maps(build(lab.upstream, in_chans=5), lab.x[:, [0, 1, 2, 2, 0]]),
)
case(
    "surgery/inputs",
    "Crop or resize",
    lambda lab: attention_maps(lab.model, lab.x[..., :5]),
    lambda lab: attention_maps(lab.model, lab.x[..., :4]),
)
case(
    "surgery/inputs",
    "Skip the call, or pass images",
    lambda lab: attention_maps(lab.model, []),
    lambda lab: attention_maps(lab.model, [lab.x]),
)
case(
    "surgery/inputs",
    "Pass None in the list",
    lambda lab: attention_maps(lab.model, [lab.x, lab.x], masks=[lab.mask.flatten(1)]),
    lambda lab: attention_maps(lab.model, [lab.x, lab.x], masks=[lab.mask.flatten(1), None]),
)
case(
    "surgery/inputs",
    "Flatten the mask grid row by row",
    lambda lab: attention_maps(lab.model, lab.x, masks=lab.mask),
    lambda lab: attention_maps(lab.model, lab.x, masks=lab.mask.flatten(1)),
)
case(
    "surgery/inputs",
    "masks.bool()",
    lambda lab: attention_maps(lab.model, lab.x, masks=lab.mask.flatten(1).int()),
    lambda lab: attention_maps(lab.model, lab.x, masks=lab.mask.flatten(1).int().bool()),
)
case(
    "surgery/inputs",
    "Blocks count from 0",
    lambda lab: lab.maps(n=[3]),
    lambda lab: lab.maps(n=[2]),
)
case(
    "surgery/inputs",
    "Pass a sequence to choose single blocks: n=[",
    lambda lab: lab.maps(n=4),
    lambda lab: lab.maps(n=[2]),
)

# Modules asked by themselves

case(
    "surgery/attend",
    "Ask the model if images are at hand, or add the batch dimension",
    lambda lab: lab.block(lab.tokens[0], return_attention=True),
    lambda lab: lab.block(lab.tokens[0][None], return_attention=True),
)
case(
    "surgery/grafts",
    "This class takes no other",
    lambda lab: lab.block.attn(lab.tokens, return_attn=True, mask=None),
    lambda lab: lab.block.attn(lab.tokens, return_attn=True),
)
case(
    "surgery/grafts",
    "Pass return_attn, return_attention, queries and heads by keyword",
    lambda lab: lab.block.attn(lab.tokens, None, None, "mean", return_attn=True),
    lambda lab: lab.block.attn(lab.tokens, heads="mean", return_attn=True),
)
case(
    "surgery/grafts",
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
    "surgery/grafts",
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
    "surgery/grafts",
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
    "surgery/install",
    'Call install(), install("some.vendored.package") or install(model)',
    lambda _: dinov2_attn.install(3),
    lambda lab: [
        dinov2_attn.install(target).__exit__() for target in (None, "some.vendored", lab.model)
    ],
)
case(
    "surgery/install",
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
    "surgery/ledger",
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
    "maps/record",
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
    "maps/subject",
    "Pass the module whose forward will run",
    lambda lab: recorded(lab.model.forward, lambda: lab.model(lab.x)),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x)),
)
case(
    "maps/subject",
    "Pass the one to record; the others may run too",
    lambda lab: recorded(nn.ModuleList([lab.model, copy.deepcopy(lab.model)]), lambda: None),
    lambda lab: recorded(lab.model, lambda: (lab.model(lab.x), copy.deepcopy(lab.model)(lab.x))),
)
case(
    "maps/subject",
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
    "maps/subject",
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
    "surgery/recording",
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
    lambda lab: of_tokens(lab).maps(),
    lambda lab: replace(of_tokens(lab).passes[0], grid=(2, 3)).maps(),
)
case(
    "maps/attention_maps",
    "Correct prefix or grid",
    lambda lab: replace(lab.maps(), grid=(3, 3)).maps(),
    lambda lab: replace(replace(lab.maps(), grid=(3, 3)), grid=(2, 3)).maps(),
)
case(
    "maps/attention_maps",
    "or keep the columns in reduce",
    lambda lab: recorded(
        lab.model, lambda: lab.model(lab.x), reduce=lambda _, weights: weights[..., 1:]
    ).maps(),
    lambda lab: recorded(
        lab.model, lambda: lab.model(lab.x), reduce=lambda _, weights: weights.mean(-2)
    ).maps(),
)
case(
    "maps/look",
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
    "Leave n out",
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
    "maps/storage",
    "or make the folder",
    lambda lab: saved(lab, lab.maps(), "absent/maps.safetensors"),
    lambda lab: (lab.folder / "absent").mkdir() or saved(lab, lab.maps(), "absent/m.safetensors"),
)
case(
    "maps/storage",
    "Save before .numpy()",
    lambda lab: saved(lab, lab.maps().numpy()),
    lambda lab: saved(lab, lab.maps()),
)
case(
    "maps/storage",
    "Name the .safetensors file itself",
    lambda lab: AttentionMaps.load(saved(lab, lab.maps()).parent),
    lambda lab: AttentionMaps.load(saved(lab, lab.maps())),
)
case(
    "upstream/checkpoints",
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
    return show.plot(maps, **options).figure


case(
    "show/looks",
    "Leave heads out of attention_maps",
    lambda lab: drawn(lab, lab.maps(heads="mean"), head=0),
    lambda lab: drawn(lab, lab.maps(), head=0),
)
case(
    "show/looks",
    "Ask attention_maps or record for it by queries=",
    lambda lab: drawn(lab, lab.maps(queries="cls"), query=(0, 1)),
    lambda lab: drawn(lab, lab.maps(queries=[0, 2]), query=(0, 1)),
)
case(
    "show/looks",
    "n=None takes all",
    lambda lab: drawn(lab, lab.maps(n=1), layer=0),
    lambda lab: drawn(lab, lab.maps(n=None), layer=0),
)
case(
    "show/looks",
    "Images count from 0",
    lambda lab: drawn(lab, lab.maps(), sample=2),
    lambda lab: drawn(lab, lab.maps(), sample=1),
)
case(
    "show/looks",
    "Give the image's",
    lambda lab: drawn(lab, lab.maps(), sample=(0, 1)),
    lambda lab: drawn(lab, lab.maps(), sample=1),
)
case(
    "show/looks",
    "Give the number of the batch and of the image in it",
    lambda lab: drawn(lab, attention_maps(lab.model, [lab.x]), sample=1),
    lambda lab: drawn(lab, attention_maps(lab.model, [lab.x]), sample=(0, 1)),
)
case(
    "show/looks",
    "Draw what attention_maps returns, without reduce",
    lambda lab: drawn(
        lab,
        recorded(lab.model, lambda: lab.model(lab.x), reduce=lambda _, w: w[0, 0, 0]),
    ),
    lambda lab: drawn(lab, recorded(lab.model, lambda: lab.model(lab.x))),
)
case(
    "show/captions",
    "Pass what artifact_tokens returned for the same batch",
    lambda lab: drawn(lab, lab.maps(), sample=1, artifacts=artifact_tokens(lab.model, lab.x[:1])),
    lambda lab: drawn(lab, lab.maps(), sample=1, artifacts=artifact_tokens(lab.model, lab.x)),
)
case(
    "show/style",
    "Check the spelling",
    lambda lab: show.Style(interpolation="nearst"),
    lambda lab: drawn(lab, lab.maps(), style=show.Style(interpolation="nearest")),
)
case(
    "show/style",
    "Try 0.5",
    lambda lab: show.Style(alpha=2),
    lambda lab: drawn(lab, lab.maps(), style=show.Style(alpha=0.5)),
)
case(
    "show/saving",
    "Rename it",
    lambda lab: show.save(drawn(lab, lab.maps()), lab.folder / "map.bmp"),
    lambda lab: show.save(drawn(lab, lab.maps()), lab.folder / "map.png"),
)
case(
    "show/saving",
    "Make its folder, or name another",
    lambda lab: show.save(drawn(lab, lab.maps()), lab.folder / "absent" / "map.png"),
    lambda lab: (
        (lab.folder / "absent").mkdir()
        or show.save(drawn(lab, lab.maps()), lab.folder / "absent" / "map.png")
    ),
)
case(
    "show/pixels",
    "Put the channels last",
    lambda lab: drawn(lab, lab.maps(), image=lab.photograph.transpose(2, 0, 1)),
    lambda lab: drawn(lab, lab.maps(), image=lab.photograph),
)
case(
    "show/tokens",
    "Registers count from 1, rows and columns of patches from 0",
    lambda lab: drawn(lab, lab.maps(), query="first"),
    lambda lab: drawn(lab, lab.maps(), query="0,0"),
)
case(
    "show/tokens",
    "Ask for cls, or for a patch by ROW,COL",
    lambda lab: drawn(lab, lab.maps(), query="register:1"),
    lambda lab: [drawn(lab, lab.maps(), query=query) for query in ("cls", "1,2")],
)
case(
    "show/tokens",
    "Give two whole numbers",
    lambda lab: drawn(lab, lab.maps(), query=(1, 2, 3)),
    lambda lab: drawn(lab, lab.maps(), query=(1, 2)),
)
case(
    "show/tokens",
    "Rows go from 0 to ",
    lambda lab: drawn(lab, lab.maps(), query=(2, 0)),
    lambda lab: drawn(lab, lab.maps(), query=(1, 2)),
)


def page(lab, maps=None, **options):
    picture = options.pop("picture", lab.photograph)
    return write_page(lab.folder / "page.html", picture, maps or lab.maps(), **options)


case(
    "show/page/frame",
    "25 is the default",
    lambda lab: page(lab, max_mb=0),
    lambda lab: page(lab, max_mb=25),
)
case(
    "show/page/frame",
    "Pass Photograph.picture",
    lambda lab: page(lab, picture=lab.photograph[:3]),
    lambda lab: page(lab),
)
case(
    "show/page/write",
    "Pass the maps of one batch",
    lambda lab: page(lab, attention_maps(lab.model, [lab.x])),
    lambda lab: page(lab, attention_maps(lab.model, lab.x)),
)
case(
    "show/page/write",
    "One page shows one image",
    lambda lab: page(lab, sample=2),
    lambda lab: page(lab, sample=1),
)

# What is not followed here, by module and snippet, with the reason.

LATER = "not followed yet"
NOTHING_TO_DO = "names no call, option or command: this cannot be had"
TABLE = {
    "needs xFormers in the process: test_biases and test_nested follow it": {
        "biases": ("",),
        "upstream/kernel": ("",),
        "surgery/nesting": ("",),
    },
    "needs a network or a package index": {
        "upstream/git": ("",),
        "upstream/published": ("",),
        "upstream/source": ("",),
        "upstream/wheel": ("",),
    },
    "needs an environment without the library": {
        "optional": ("pip install",),
        "verify/proof": ("pip install",),
        "show/saving": ("Install it (apt install ffmpeg", "or install an ffmpeg with H.264"),
    },
    NOTHING_TO_DO: {
        "surgery/operation": ("This class is not supported",),
        "upstream/contract": ("so nothing was grafted", "This copy was patched by hand"),
        "upstream/selfcheck": ("so nothing was grafted",),
        "maps/subject": ("Weights of shared modules cannot be told apart",),
        "surgery/attend": ("Ask for the weights, which know of it",),
    },
    "whether a hook is seen differs from torch to torch: test_record_compiled asks": {
        "surgery/recording": ("Where qkv itself was compiled",),
    },
    "needs a copy that upstream has renamed": {"surgery/targets": ("Upstream moved",)},
    LATER: {
        "dataset/decode": ("",),
        "dataset/item": ("",),
        "dataset/pictured": ("",),
        "dataset/sources": ("",),
        "dataset/tars": ("",),
        "show/decoding": ("",),
        "show/opening": ("",),
        "show/ranges": ("",),
        "show/reading": ("",),
        "upstream/folders": ("",),
        "upstream/heads": ("",),
        "upstream/kinds": ("",),
        "upstream/stated": ("",),
        "show/pixels": ("Convert to uint8", "Replace them.", "Divide it by the value of white"),
        "commands/demo": ("",),
        "commands/explore": ("",),
        "commands/heatmap": ("",),
        "commands/loading": ("",),
        "commands/photographs": ("",),
        "commands/verify": ("",),
        "dataset/extract": ("",),
        "dataset/items": ("",),
        "dataset/job": ("",),
        "dataset/layout": ("",),
        "dataset/options": ("",),
        "dataset/read": ("",),
        "dataset/run": ("",),
        "dataset/shards": ("",),
        "demo/load": ("",),
        "show/files": ("",),
        "show/images": ("",),
        "show/page/keep": ("",),
        "show/page/quantise": ("",),
        "show/page/write": ("Ask all layers for the same queries and heads",),
        "show/running": ("",),
        "show/tokens": ("Registers count from 1.",),
        "surgery/transformer": ("and do so before compiling it",),
        "upstream/architecture": ("",),
        "upstream/checkpoints": (
            "Pass its state_dict()",
            "Build the model",
            "build that in place of",
        ),
        "upstream/layouts": ("",),
        "upstream/models": ("",),
        "upstream/reading": ("",),
        "verify/sources": ("",),
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
