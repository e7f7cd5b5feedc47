"""``dinov2-attn demo``: the pictures of ``heatmap``, of scenes and a model that ship."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli import plot_options
from dinov2_attn.apps.cli.argtypes import positive, whole
from dinov2_attn.apps.cli.image_options import require_libraries
from dinov2_attn.apps.cli.model_options import Loaded, load_model
from dinov2_attn.apps.demo.load import PATH
from dinov2_attn.errors import InvalidInputError

if TYPE_CHECKING:
    from dinov2_attn.apps.demo.scenes import Scene

log = logging.getLogger(__name__)

DESCRIPTION = """\
Draw scenes with one target of rings among other shapes, and write what a small model looks at
in each: heads.png, overlay.png and the like, as heatmap does. The model ships
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
    parser.add_argument("--device", default="cpu", help="torch's name of it, default: cpu")
    # What stands out in this model is the target, as it was trained to.
    plot_options.add_options(parser, outliers="none")
    options = ("arch", "registers", "patch_size", "num_heads", "key", "random_weights")
    parser.set_defaults(run=run, weights=PATH, **dict.fromkeys(options))


def run(args: argparse.Namespace) -> int:
    """Draw every scene and what the model looks at in it, and say where that is."""
    require_libraries()
    from dinov2_attn.apps.demo.scenes import FIRST_TRAINING_SEED, draw

    if args.seed + args.count > FIRST_TRAINING_SEED:
        raise InvalidInputError(
            f"scenes of seeds below {FIRST_TRAINING_SEED:,}, where those of the training begin",
            f"{args.count} from {args.seed} on",
            "Choose a smaller --seed.",
        )
    loaded = load_model(args)
    plot_options.check(args, loaded)
    found = 0
    for i in range(args.count):
        shape = list(SHAPES)[i % len(SHAPES)]
        scene = draw(args.seed + i, SHAPES[shape])
        folder = args.output / f"scene-{args.seed + i}-{shape}"
        hit = _show(loaded, scene, folder, args)
        print(f"{folder}: the map's maximum is {'on' if hit else 'beside'} the target")
        found += hit
    print(f"pointing game: {found} of {args.count}\n{WHAT_IT_IS}")
    return 0


def _show(loaded: Loaded, scene: Scene, folder: Path, args: argparse.Namespace) -> bool:
    """Write the pictures of one scene, and say whether the model points at its target."""
    import torch

    from dinov2_attn.apps.demo.game import peak, to_tensor
    from dinov2_attn.apps.viz.images import Photograph

    photograph = Photograph(to_tensor([scene])[0], scene.picture)
    maps = plot_options.write(loaded, photograph, str(folder), folder, args)
    return bool(scene.mask[peak(torch.from_numpy(maps.mean(axis=0)), scene.mask.shape)])
