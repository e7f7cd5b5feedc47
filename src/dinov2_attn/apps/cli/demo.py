"""``dinov2-attn demo``: the pictures of ``heatmap``, for scenes and a model that ship."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli import plot_options
from dinov2_attn.apps.cli.argtypes import add_output, add_source_and_device, positive, whole
from dinov2_attn.apps.cli.image_options import require_libraries
from dinov2_attn.apps.cli.model_options import Loaded, load_model
from dinov2_attn.apps.demo.load import PATH
from dinov2_attn.errors import InvalidInputError

if TYPE_CHECKING:
    from dinov2_attn.apps.demo.scenes import Scene

log = logging.getLogger(__name__)

DESCRIPTION = """\
Draw scenes in which one target of rings stands among other shapes, and write the attention of a
small model for each of them, as heatmap does. The model ships with this package. Upstream's code
is downloaded if it is not importable.
"""

EPILOG = """\
Example: dinov2-attn demo -o out --count 2 --overview
"""

# Height and width in patches.
SHAPES = {"square": (10, 10), "wide": (7, 14), "tall": (14, 7)}

WHAT_IT_IS = """\
The model is a small DinoVisionTransformer whose CLS attention was trained to find the target.
It shows that maps are in the right places, and nothing about Meta's weights."""


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="Draw the attention of a small model that ships with this package.",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_output(parser, "DIR", "The folder for the scenes, one folder each.")
    parser.add_argument(
        "--count", type=positive, default=3, metavar="N", help="The number of scenes. Default: 3."
    )
    parser.add_argument(
        "--seed",
        type=whole,
        default=0,
        metavar="N",
        help="The seed of the first scene. Default: 0.",
    )
    add_source_and_device(parser)
    # The outliers of this model are the target, which it was trained to find.
    plot_options.add_options(parser, outliers="none")
    options = ("arch", "registers", "patch_size", "num_heads", "random_weights", "key")
    parser.set_defaults(run=run, weights=PATH, **dict.fromkeys(options))


def run(args: argparse.Namespace) -> int:
    """Draw every scene with its attention, and print whether the maximum is on the target."""
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
        print(f"{folder}: the map's maximum is {'on' if hit else 'not on'} the target")
        found += hit
    print(f"pointing game: {found} of {args.count}\n{WHAT_IT_IS}")
    return 0


def _show(loaded: Loaded, scene: Scene, folder: Path, args: argparse.Namespace) -> bool:
    """Write the pictures of one scene; return whether the maximum is on the target."""
    import torch

    from dinov2_attn.apps.demo.game import peak, to_tensor
    from dinov2_attn.apps.viz.images import LoadedImage

    image = LoadedImage(to_tensor([scene])[0], scene.picture)
    maps = plot_options.write(loaded, image, str(folder), folder, args)
    return bool(scene.mask[peak(torch.from_numpy(maps.mean(axis=0)), scene.mask.shape)])
