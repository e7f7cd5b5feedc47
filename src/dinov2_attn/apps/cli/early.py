"""What is wrong with paths and names on the command line, said before torch is imported."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from dinov2_attn._files import check_destination, destination
from dinov2_attn.apps.cli.model_names import chosen
from dinov2_attn.apps.viz.tokens import check_queries
from dinov2_attn.apps.weights import checkout
from dinov2_attn.apps.weights.files import files_of
from dinov2_attn.apps.weights.models import DEPTHS
from dinov2_attn.errors import OutOfRangeError, UnreadableFileError, UnwritableOutputError


def check_model(args: argparse.Namespace) -> None:
    """Raise what is wrong with the options of a model, as far as no file has to be read for it."""
    args = chosen(args)
    if args.weights is not None:
        with suppress(OSError):  # which reading it reports
            files_of(Path(args.weights))
    if args.repo is not None:
        checkout.check(args.repo, dinov3=args.model_is_dinov3)


def check_tokens(
    args: argparse.Namespace, queries: Sequence[str], layers: Sequence[int] | None
) -> None:
    """Raise for registers and layers that the published model of this name has not."""
    args = chosen(args)
    if args.weights is not None or args.arch not in (None, *DEPTHS) or args.model_is_timm:
        return
    check_queries(queries, 4 if args.registers else 0)
    depth = DEPTHS[args.arch or "vit_small"]
    for layer in layers or ():
        if not -depth <= layer < depth:
            raise OutOfRangeError(
                f"blocks between -{depth} and {depth - 1}",
                str(layer),
                "Blocks count from 0, and from the end with -1. Name others, or all.",
            )


def check_image(path: Path) -> None:
    """Raise ``UnreadableFileError`` if ``path`` is no file, or a video, or may not be read."""
    check_input(path)
    if path.is_dir():
        raise UnreadableFileError(
            "an image file",
            f"{path}, which cannot be read: it is a folder",
            "Name its images. `dinov2-attn extract` takes folders.",
        )
    from dinov2_attn.apps.viz.videos import is_video

    if is_video(path):
        raise UnreadableFileError(
            "an image file",
            f"{path}, which is called like a video",
            "Save a frame of it as an image. `dinov2-attn heatmap` makes a film of the whole.",
        )


def check_input(path: Path, what: str = "an image file") -> None:
    """Raise ``UnreadableFileError`` if there is nothing at ``path`` that may be read."""
    try:
        os.stat(path)
        readable = os.access(path, os.R_OK)
    except (OSError, ValueError) as error:
        raise UnreadableFileError(
            what,
            f"{path}, which cannot be read ({type(error).__name__}: {_reason(error)})",
            f"Check the path.{_suggestion(path)}",
        ) from error
    if not readable:
        raise UnreadableFileError(
            "a file that you may read",
            f"{path}, which cannot be read (permission denied)",
            "Change its permissions.",
        )


def check_folder(path: Path) -> None:
    """Raise ``UnwritableOutputError`` if the folder ``path`` can neither be written nor made."""
    _check_output(path, "a folder", os.path.isdir)


def check_file(path: Path) -> None:
    """Raise ``UnwritableOutputError`` if the file ``path`` cannot be written."""
    check_folder(path.parent)
    check_destination(path)
    target = destination(path)  # of links
    check_folder(target.parent)
    _check_output(target, "a file", os.path.isfile)


def _check_output(path: Path, what: str, fits: Callable[[Path], bool]) -> None:
    wrong = _in_the_way(Path(os.path.abspath(path)), fits)
    if wrong is not None:
        raise UnwritableOutputError(
            f"{what} that can be written at {path}", wrong, "Name another one."
        )


def _in_the_way(path: Path, fits: Callable[[Path], bool]) -> str | None:
    """Return why ``path`` cannot be written, or ``None``."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return None if path.parent == path else _in_the_way(path.parent, os.path.isdir)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {_reason(error)}"
    if not fits(path):
        return f"{path}, which is something else"
    return None if os.access(path, os.W_OK) else f"{path}, which you may not write"


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _suggestion(path: Path) -> str:
    with suppress(OSError, ValueError):
        # A link that leads nowhere is listed there too.
        others = [name for name in os.listdir(path.parent) if name != path.name]
        near = difflib.get_close_matches(path.name, others, 1)
        if near:
            return f" Did you mean {path.with_name(near[0])}?"
    return ""
