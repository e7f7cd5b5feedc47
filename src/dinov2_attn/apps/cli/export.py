"""``dinov2-attn export``: a model with its attention as an ONNX file."""

from __future__ import annotations

import argparse
import logging
from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli import early
from dinov2_attn.apps.cli.argtypes import HEADS, positive
from dinov2_attn.apps.cli.image_options import image_size
from dinov2_attn.apps.cli.model_options import add_options, load_model
from dinov2_attn.apps.cli.report import say
from dinov2_attn.apps.export.asked import read_asked
from dinov2_attn.apps.export.libraries import require_libraries
from dinov2_attn.errors import InvalidInputError, UnfaithfulError, in_one_line

if TYPE_CHECKING:
    from dinov2_attn.apps.export.onnx import OnnxExport

log = logging.getLogger(__name__)

DESCRIPTION = """\
Write the model as an ONNX file that returns its attention beside its output. The outputs are
features and attention_11 for layer 11. The graph takes batches of any size, and images of one size.
Then onnxruntime runs the file, and its outputs are compared with those of PyTorch. If they differ,
the exit status is 1 and no file is left. Needs `pip install 'dinov2-attn[onnx]'`.
"""

EPILOG = """\
Example: dinov2-attn export model.onnx --attentions last:cls --weights teacher.pth --image-size 224
"""


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "export",
        help="Write a model with its attention as an ONNX file.",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="MODEL.onnx", help="The file to write: one."
    )
    group = parser.add_argument_group("what is exported")
    group.add_argument(
        "--attentions",
        type=attentions,
        default="last:cls",
        metavar="LAYERS[:TOKENS]",
        help="Whose attention is returned. Layers are last, all, or numbers from 0 on with commas "
        "between them (negative ones from the end, as in --attentions=-2,-1:cls). Tokens are cls, "
        "registers, patches, register:2 or 3,17. Without them all rows are returned. Default: "
        "last:cls.",
    )
    group.add_argument("--heads", choices=("each", "mean"), default="each", help=HEADS)
    group.add_argument(
        "--image-size",
        nargs="+",
        metavar=("N", "W"),
        help="The side of square images in pixels, or height and width. Default: the model's own.",
    )
    group.add_argument(
        "--opset",
        type=positive,
        metavar="N",
        help="The version of ONNX's operators. Default: that of the exporter.",
    )
    group.add_argument(
        "--no-check", action="store_true", help="Do not run the file in onnxruntime."
    )
    add_options(parser)
    parser.set_defaults(run=run)


def attentions(text: str) -> str:
    """Return ``text`` if it names layers and tokens."""
    try:
        read_asked(text)
    except InvalidInputError as error:
        raise ArgumentTypeError(in_one_line(error)) from error
    return text


def run(args: argparse.Namespace) -> int:
    """Write the file; return 1 if onnxruntime returns something else."""
    size, swallowed = image_size(args.image_size or [])
    file = _only([*args.files, *swallowed])
    early.check_model(args)
    early.check_file(file)
    require_libraries(not args.no_check)
    loaded = load_model(args)
    from dinov2_attn.apps.export.onnx import export_onnx

    try:
        done = export_onnx(
            loaded.model,
            file,
            args.attentions,
            heads="mean" if args.heads == "mean" else None,
            image_size=size,
            opset=args.opset,
            check=not args.no_check,
            name=loaded.name,
        )
    except UnfaithfulError as error:
        log.error("%s", error)
        return 1
    _say(args, loaded.name, done)
    return 0


def _say(args: argparse.Namespace, name: str, done: OnnxExport) -> None:
    say(args, f"{name}: {done}")
    if done.differences:
        gaps = ", ".join(f"{gap:.1e} in {key}" for key, gap in done.differences.items())
        say(args, f"onnxruntime differs from PyTorch by at most {gaps}")
    say(args, f"wrote {done.path}: {done.bytes / 1e6:,.1f} MB")


def _only(files: list[Path]) -> Path:
    if len(files) != 1:
        raise InvalidInputError(
            "one file to write", ", ".join(map(str, files)) or "none", "Name it: model.onnx."
        )
    return files[0]
