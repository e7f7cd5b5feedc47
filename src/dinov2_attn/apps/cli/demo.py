"""``dinov2-attn demo``: the pictures of ``heatmap``, for scenes and a model that ship."""

from __future__ import annotations

import argparse
import hashlib
import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli import early, plot_options
from dinov2_attn.apps.cli.argtypes import add_output, add_source_and_device, positive, whole
from dinov2_attn.apps.cli.drawing import Drawn, Subject, write
from dinov2_attn.apps.cli.image_options import require_libraries
from dinov2_attn.apps.cli.log import held_back
from dinov2_attn.apps.cli.model_options import Loaded, load_model
from dinov2_attn.apps.cli.report import add_open, open_file, removed, say, wrote
from dinov2_attn.apps.demo.load import PATH
from dinov2_attn.errors import InvalidInputError

if TYPE_CHECKING:
    from dinov2_attn.apps.demo.scenes import Scene

DESCRIPTION = """\
Draw scenes in which one target of rings stands among other shapes, and write the attention of a
small model for each of them, as heatmap does. A line is drawn around the target. page.html is the
page of explore. The model ships with this package. Upstream's code is downloaded if it is not
importable.
"""

EPILOG = """\
Example: dinov2-attn demo -o out --count 2 --overview
"""

# Height and width in patches.
SHAPES = {"square": (10, 10), "wide": (7, 14), "tall": (14, 7)}

PAGE = "page.html"
WHAT_TO_SEE = "the target is outlined, and the brightest patch of the mean lies on it"
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
    add_open(parser, "the picture of the first scene")
    options = ("model", "arch", "registers", "patch_size", "num_heads", "random_weights", "key")
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
    early.check_model(args)
    early.check_folder(args.output)
    with held_back("dinov2_attn.apps.weights.source"):
        loaded = load_model(args)
        loaded = replace(loaded, name=f"the demo model {loaded.name.partition(',')[0]}")
        plot_options.check(args, loaded)
        found, shown = 0, []
        for i in range(args.count):
            shape = list(SHAPES)[i % len(SHAPES)]
            drawn, hit = _show(
                loaded, draw(args.seed + i, SHAPES[shape]), args.seed + i, shape, args
            )
            place = "on the target" if hit else "not on the target"
            say(args, f"{drawn.folder}: the map's maximum is {place}")
            found += hit
            shown.append(drawn)
        _end(args, found, shown, loaded.model)
    return 0


def _end(args: argparse.Namespace, found: int, shown: list[Drawn], model: object) -> None:
    first = shown[0]
    say(args, f"pointing game: {found} of {args.count}")
    say(args, wrote(args, first.folder, first.files, WHAT_TO_SEE))
    if len(shown) > 1:
        others = ", ".join(drawn.folder.name for drawn in shown[1:])
        say(args, f"      and the same in {args.output} for {others}")
    say(args, f"page: {first.folder / PAGE}: point at a patch to see where it looks")
    for drawn in shown:
        if drawn.removed:
            say(args, removed(args, drawn.folder, drawn.removed))
    say(args, WHAT_IT_IS)
    say(args, f"next: dinov2-attn heatmap YOUR_IMAGE.jpg -o maps --model {_published(model)}")
    if args.open:
        open_file(first.folder / first.files[0])


def _published(model: object) -> str:
    """Return the name of a published model that the code of ``model`` can build."""
    known = inspect.signature(type(model)).parameters
    return "dinov2_vits14_reg" if "num_register_tokens" in known else "dinov2_vits14"


def _show(
    loaded: Loaded, scene: Scene, seed: int, shape: str, args: argparse.Namespace
) -> tuple[Drawn, bool]:
    """Write the pictures and the page of one scene; say whether the maximum is on the target."""
    import torch

    from dinov2_attn.apps.demo.game import peak, to_tensor
    from dinov2_attn.apps.explorer.explore import explore
    from dinov2_attn.apps.viz.images import LoadedImage
    from dinov2_attn.apps.viz.provenance import Origin

    image = LoadedImage(to_tensor([scene])[0], scene.picture)
    name = f"scene {seed} ({shape})"
    origin = Origin(name, hashlib.sha256(scene.picture.tobytes()).hexdigest())
    page = explore(loaded.model, image, title=name, name=loaded.name)
    subject = Subject(image, origin, scene.mask, {PAGE: page.save})
    drawn = write(loaded, subject, args.output / f"scene-{seed}-{shape}", args)
    mean = torch.from_numpy(drawn.cls.mean(axis=0))
    return drawn, bool(scene.mask[peak(mean, scene.mask.shape)])
