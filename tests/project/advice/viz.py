"""Advice about pictures: what is drawn of maps, and pages of them."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import torch

from dinov2_attn import artifact_tokens, attention_maps, relevance, rollout, viz
from dinov2_attn.apps.explorer.write import write_page
from tests.project.advice.recordings import recorded
from tests.support.advice import Table
from tests.support.recordings import build

CASES = Table()
case = CASES.add


def drawn(lab, maps, **options):
    return viz.plot(maps, **options).figure


def rolled(lab, **options):
    return drawn(lab, rollout(lab.model, lab.x), **options)


def explored(lab, **options):
    return viz.explore(lab.maps(), lab.photograph, **options)


case(
    "apps/explorer",
    "Pass target=relevance(model, images, target), or the model",
    lambda lab: explored(lab, target=3),
    lambda lab: (
        explored(lab, target=relevance(lab.model, lab.x, 3)),
        viz.explore(lab.small, lab.photograph, target=3),
    ),
)
case(
    "apps/explorer",
    "Leave other out, or the target",
    lambda lab: viz.explore(lab.small, lab.photograph, other=lab.small, target=3),
    lambda lab: (
        viz.explore(lab.small, lab.photograph, target=3),
        viz.explore(lab.small, lab.photograph, other=lab.small),
    ),
)
case(
    "apps/explorer",
    "Pass what relevance returned for the same image",
    lambda lab: explored(lab, target=relevance(lab.model, lab.x[..., :4], 3)),
    lambda lab: explored(lab, target=relevance(lab.model, lab.x, 3)),
)
case(
    "apps/viz",
    "Leave it out. Maps of one layer and head",
    lambda lab: rolled(lab, layer=1),
    lambda lab: (rolled(lab), drawn(lab, lab.maps(), layer=1)),
)
case(
    "maps",
    "Name one of these, or leave heads='mean' out where the maps are made",
    lambda lab: drawn(lab, lab.maps(heads="mean"), head=0),
    lambda lab: drawn(lab, lab.maps(), head=0),
)
case(
    "maps",
    "Ask attention_maps or record for it by queries=",
    lambda lab: drawn(lab, lab.maps(queries="cls"), query=(0, 1)),
    lambda lab: drawn(lab, lab.maps(queries=[0, 2]), query=(0, 1)),
)
case(
    "maps",
    "layers=None takes all",
    lambda lab: drawn(lab, lab.maps(layers=1), layer=0),
    lambda lab: drawn(lab, lab.maps(layers=None), layer=0),
)
case(
    "maps",
    "Images count from 0",
    lambda lab: drawn(lab, lab.maps(), sample=2),
    lambda lab: drawn(lab, lab.maps(), sample=1),
)
case(
    "maps",
    "Take what reduce returned as it is",
    lambda lab: reduced(lab).at(0),
    lambda lab: reduced(lab)[0],
)
case(
    "maps",
    "Give the image's",
    lambda lab: drawn(lab, lab.maps(), sample=(0, 1)),
    lambda lab: drawn(lab, lab.maps(), sample=1),
)
case(
    "apps/viz",
    "draw one of them, such as maps[0]",
    lambda lab: drawn(lab, attention_maps(lab.model, [lab.x]), sample=1),
    lambda lab: drawn(lab, attention_maps(lab.model, [lab.x])[0], sample=1),
)


def reduced(lab):
    """Return maps that hold sums in place of weights."""
    recording = recorded(lab.model, lambda: lab.model(lab.x), reduce=lambda _, w: w.sum((1, 2, 3)))
    return recording[0]


case(
    "apps/viz",
    "Draw what attention_maps returns, without reduce",
    lambda lab: drawn(
        lab,
        recorded(lab.model, lambda: lab.model(lab.x), reduce=lambda _, w: w[0, 0, 0]),
    ),
    lambda lab: drawn(lab, recorded(lab.model, lambda: lab.model(lab.x))),
)
case(
    "apps/viz",
    "Pass what artifact_tokens returned for the same batch",
    lambda lab: drawn(lab, lab.maps(), sample=1, artifacts=artifact_tokens(lab.model, lab.x[:1])),
    lambda lab: drawn(lab, lab.maps(), sample=1, artifacts=artifact_tokens(lab.model, lab.x)),
)
case(
    "apps/viz",
    "Check the spelling",
    lambda lab: viz.Style(interpolation="nearst"),
    lambda lab: drawn(lab, lab.maps(), style=viz.Style(interpolation="nearest")),
)
case(
    "apps/viz",
    "Try 0.5",
    lambda lab: viz.Style(alpha=2),
    lambda lab: drawn(lab, lab.maps(), style=viz.Style(alpha=0.5)),
)
case(
    "apps/viz",
    "Try 'robust' or (0, 8)",
    lambda lab: viz.Style(limits="all"),
    lambda lab: [
        drawn(lab, lab.maps(), style=viz.Style(limits=limits)) for limits in ("robust", (0, 8))
    ],
)


def paper(lab, maps=None, images=None, **options):
    maps = maps or [lab.maps(), lab.maps()]
    if images is None:
        images = [lab.photograph, lab.photograph]
    return viz.figure(maps, images, **options)


case(
    "apps/viz",
    "Ask for fewer columns, or for another width such as 3.25 or 6.75",
    lambda lab: paper(lab, columns=["photo", "mean", 0, 1] * 3),
    lambda lab: [
        paper(lab, columns=["photo", "mean", 0, 1]),
        paper(lab, columns=["photo", "mean", 0, 1] * 3, width=6.75),
    ],
)
case(
    "apps/viz",
    "Add 'mean' or the number of a head",
    lambda lab: paper(lab, columns=["photo"]),
    lambda lab: [paper(lab, columns=["photo", column]) for column in ("mean", 0)],
)
case(
    "apps/viz",
    "Name each image, or none of them",
    lambda lab: paper(lab, names=["a"]),
    lambda lab: [paper(lab, names=["a", "b"]), paper(lab)],
)
case(
    "apps/viz",
    "Pass a list of images, one for each of a list of maps or of the batch",
    lambda lab: paper(lab, images=lab.photograph),
    lambda lab: [paper(lab), paper(lab, maps=lab.maps())],
)
case(
    "apps/viz",
    "Rename it",
    lambda lab: viz.save(drawn(lab, lab.maps()), lab.folder / "map.bmp"),
    lambda lab: viz.save(drawn(lab, lab.maps()), lab.folder / "map.png"),
)
case(
    "apps/viz",
    "Create its folder, or give another path",
    lambda lab: viz.save(drawn(lab, lab.maps()), lab.folder / "absent" / "map.png"),
    lambda lab: (
        viz.save(drawn(lab, lab.maps()), lab.folder / "another.png"),
        (lab.folder / "absent").mkdir(),
        viz.save(drawn(lab, lab.maps()), lab.folder / "absent" / "map.png"),
    ),
)
case(
    "apps/viz",
    "Put the channels last",
    lambda lab: drawn(lab, lab.maps(), image=lab.photograph.transpose(2, 0, 1)),
    lambda lab: drawn(lab, lab.maps(), image=lab.photograph),
)
case(
    "math",
    "Registers count from 1, rows and columns of patches from 0",
    lambda lab: drawn(lab, lab.maps(), query="first"),
    lambda lab: [drawn(lab, lab.maps(), query=query) for query in ("0,0", "#6")],
)
case(
    "math",
    "Ask for cls, or for a patch by ROW,COL",
    lambda lab: drawn(lab, lab.maps(), query="register:1"),
    lambda lab: [drawn(lab, lab.maps(), query=query) for query in ("cls", "1,2")],
)
case(
    "math",
    "Ask for a patch: (0, 0) in Python",
    lambda lab: drawn(lab, without_cls(lab)),
    lambda lab: [drawn(lab, without_cls(lab), query=query) for query in ((0, 0), "0,0")],
)
case(
    "math",
    "Give two whole numbers",
    lambda lab: drawn(lab, lab.maps(), query=(1, 2, 3)),
    lambda lab: drawn(lab, lab.maps(), query=(1, 2)),
)
case(
    "math",
    "Rows go from 0 to ",
    lambda lab: drawn(lab, lab.maps(), query=(2, 0)),
    lambda lab: drawn(lab, lab.maps(), query=(1, 2)),
)


def page(lab, maps=None, **options):
    picture = options.pop("picture", lab.photograph)
    return write_page(lab.folder / "page.html", picture, maps or lab.maps(), **options)


def uneven(lab):
    """Return a model whose second layer has other heads."""
    model = copy.deepcopy(lab.small)
    model.blocks[1].attn.num_heads = 1
    model.blocks[1].attn.scale = 1.0
    return model


def page_of_photograph(lab):
    image = viz.load_image(lab.image, lab.small)
    return page(lab, attention_maps(lab.small, image.tensor[None]), picture=image.picture)


case(
    "apps/explorer",
    "25 is the default",
    lambda lab: page(lab, max_mb=0),
    lambda lab: page(lab, max_mb=25),
)
case(
    "apps/explorer",
    "Pass the .picture of the LoadedImage from which these maps were computed",
    lambda lab: page(lab, picture=lab.photograph[:3]),
    page_of_photograph,
)
case(
    "apps/explorer",
    "pass one of them, such as maps[0]",
    lambda lab: page(lab, attention_maps(lab.model, [lab.x])),
    lambda lab: page(lab, attention_maps(lab.model, [lab.x])[0]),
)
case(
    "apps/explorer",
    "Pass the maps of one batch, as attention_maps or record return them",
    lambda lab: page(lab, replace(lab.maps(), weights=tuple(w[0, 0] for w in lab.maps().weights))),
    lambda lab: (
        page(lab, lab.maps()),
        page(lab, recorded(lab.model, lambda: lab.model(lab.x))),
    ),
)
case(
    "apps/explorer",
    "A page cannot show it",
    lambda lab: page(lab, replace(lab.maps(), grid=None)),
    lambda lab: page(lab, recorded(lab.model, lambda: lab.model(lab.x), grid=(2, 3), prefix=1)),
)
case(
    "apps/explorer",
    "Name some of them: layers=[...]",
    lambda lab: viz.explore(uneven(lab), viz.load_image(lab.image, lab.small)),
    lambda lab: viz.explore(uneven(lab), viz.load_image(lab.image, lab.small), layers=[0]),
)
case(
    "apps/explorer",
    "One page shows one image",
    lambda lab: page(lab, sample=2),
    lambda lab: page(lab, sample=1),
)


def without_cls(lab):
    """Say of 7 columns that all are of patches."""
    return replace(lab.maps(), prefix=0, grid=(1, 7))


def with_registers(lab):
    """Say of 7 columns that two are of registers."""
    return replace(lab.maps(), prefix=3, grid=(2, 2))


case(
    "math",
    "Registers count from 1.",
    lambda lab: drawn(lab, with_registers(lab), query="register:3"),
    lambda lab: drawn(lab, with_registers(lab), query="register:1"),
)
case(
    "apps/explorer",
    "Raise --max-mb (max_mb) by ",
    lambda lab: page(lab, max_mb=0.001),
    lambda lab: page(lab, max_mb=0.001 + float(re.search(r"by ([\d.]+) or more", lab.hint)[1])),
)
case(
    "apps/explorer",
    "Ask all layers for the same queries and heads",
    lambda lab: page(lab, mixed(lab.maps(), lab.maps(heads="mean"))),
    lambda lab: page(lab, mixed(lab.maps(), lab.maps())),
)


def mixed(first, second):
    return replace(first, weights=(*first.weights[:1], *second.weights[1:]))


def with_nan(lab):
    """Give the checkpoint of ``lab`` one NaN."""
    state = {name: tensor.clone() for name, tensor in lab.model.state_dict().items()}
    state["blocks.2.attn.qkv.weight"][0, 0] = torch.nan
    return state


def page_of(lab, state):
    model = build(lab.upstream)
    model.load_state_dict(state)
    return page(lab, attention_maps(model, lab.x))


def without_nan(state):
    return {name: torch.nan_to_num(tensor) for name, tensor in state.items()}


case(
    "apps/explorer",
    "and search its checkpoint for NaN",
    lambda lab: page_of(lab, with_nan(lab)),
    lambda lab: page_of(lab, without_nan(with_nan(lab))),
)
case(
    "apps/viz",
    "Give both models the same crop of the image",
    lambda lab: viz.compare(lab.maps(), attention_maps(lab.model, lab.x.mT)),
    lambda lab: viz.compare(lab.maps(), attention_maps(lab.model, lab.x)),
)
case(
    "apps/viz",
    "Leave limits at 'robust', or give 'shared' or (low, high)",
    lambda lab: viz.compare(lab.maps(), lab.maps(), style=viz.Style(limits="each")),
    lambda lab: [
        viz.compare(lab.maps(), lab.maps(), style=viz.Style(limits=limits))
        for limits in ("robust", "shared", (0, 8))
    ],
)


def two(lab, first, **options):
    return viz.explore(first, lab.photograph, other=lab.small, **options)


case(
    "apps/explorer",
    "Of maps, draw a picture: viz.compare(a, b)",
    lambda lab: two(lab, lab.maps()),
    lambda lab: [two(lab, lab.small), viz.compare(lab.maps(), lab.maps())],
)
case(
    "apps/explorer",
    "Give B an image of another size",
    lambda lab: two(lab, lab.small, other_image=lab.photograph[:2]),
    lambda lab: two(lab, lab.small, other_image=lab.photograph),
)
