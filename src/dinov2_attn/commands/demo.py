"""``dinov2-attn demo``: the pictures of ``heatmap``, of scenes and a model that ship."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.commands.photographs import require_libraries
from dinov2_attn.commands.values import positive, whole
from dinov2_attn.errors import InvalidInput

if TYPE_CHECKING:
    from dinov2_attn.demo.scenes import Scene

log = logging.getLogger(__name__)

DESCRIPTION = """\
Draw scenes with one target of rings among other shapes, and write what a small model looks at
in each: img.png, attn-mean.png, overlay-mean.png and the like, as heatmap does. The model ships
with this package; only upstream's code is fetched where it is not importable.
"""

# Height and width in patches.
SHAPES = {"square": (10, 10), "wide": (7, 14), "tall": (14, 7)}

WHAT_IT_IS = """\
The model is a small DinoVisionTransformer whose CLS attention was trained with the targets' masks
to do just this: it shows that maps come out in their places, and nothing about Meta's weights."""


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "demo", help="the attention of a small model that ships", description=DESCRIPTION
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--count", type=positive, default=3, metavar="N", help="how many scenes, default: 3"
    )
    parser.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="of the first scene, default: 0"
    )
    parser.add_argument("--repo", metavar="PATH", help="a checkout of facebookresearch/dinov2")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw every scene and what the model looks at in it, and say where that is."""
    require_libraries()
    from dinov2_attn.demo.scenes import FIRST_TRAINING_SEED, draw

    if args.seed + args.count > FIRST_TRAINING_SEED:
        raise InvalidInput(
            f"scenes of seeds below {FIRST_TRAINING_SEED:,}, where those of the training begin",
            f"{args.count} from {args.seed} on",
            "Choose a smaller --seed.",
        )
    model = _model(args.repo)
    found = 0
    for i in range(args.count):
        shape = list(SHAPES)[i % len(SHAPES)]
        scene = draw(args.seed + i, SHAPES[shape])
        folder = args.output / f"scene-{args.seed + i}-{shape}"
        hit = _show(model, scene, folder)
        print(f"{folder}: the map's maximum is {'on' if hit else 'beside'} the target")
        found += hit
    print(f"pointing game: {found} of {args.count}\n{WHAT_IT_IS}")
    return 0


def _model(repo: str | None) -> Any:
    import dinov2_attn
    from dinov2_attn.demo.load import load_demo_model
    from dinov2_attn.upstream.source import obtain

    # It has no kernel for a CPU, and upstream would call one wherever xFormers imports.
    sys.modules.setdefault("xformers", None)  # type: ignore[arg-type]  # Python's own sign
    log.info("%s", obtain(repo))
    dinov2_attn.install()
    return load_demo_model()


def _show(model: Any, scene: Scene, folder: Path) -> bool:
    """Write the pictures of one scene, and say whether the model points at its target."""
    import torch

    from dinov2_attn.demo.game import peak, to_tensor
    from dinov2_attn.show.heatmap import cls_maps, draw, write
    from dinov2_attn.show.images import Photograph

    photograph = Photograph(to_tensor([scene])[0], scene.picture)
    maps = cls_maps(model, photograph)
    write(folder, photograph, maps, draw(photograph, maps, model.patch_size))
    return bool(scene.mask[peak(torch.from_numpy(maps.mean(axis=0)), scene.mask.shape)])
