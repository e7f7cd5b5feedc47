"""What a command says of its work: the files that it wrote, the one to open, what comes next."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import webbrowser
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dinov2_attn.apps.cli.argtypes import Options
from dinov2_attn.errors import shown

log = logging.getLogger(__name__)

WIDTH = 100
RECORD = "run.json"  # that of a folder; a file has its own name before it

# Of these, records and the next command say nothing.
_OWN = (
    *("run", "parser", "command", "quiet", "verbose", "open", "print_completion", "second"),
    *("output", "images", "sources"),
)
_MODEL = (
    *("model", "arch", "weights", "random_weights", "registers", "patch_size", "num_heads", "key"),
    *("repo", "device"),
)
# How images are read, and what of a heatmap a page shows too.
_READING = ("max_pixels", "range", "mean", "std")
_SHOWN = {"explore": ("target", "method")}

_OF_A_HEAD = re.compile(r"(.*head)(\d+)(.*)")


def add_open(parser: Options, what: str) -> None:
    """Add ``--open`` to ``parser``."""
    parser.add_argument("--open", action="store_true", help=f"Open {what} at the end.")


def say(args: argparse.Namespace, text: str) -> None:
    """Print ``text``, unless the user wants it quiet. Names in it cannot steer the terminal."""
    if not args.quiet:
        print(shown(text), flush=True)


def wrote(args: argparse.Namespace, folder: Path, files: Sequence[str], first: str) -> str:
    """Return which ``files`` of ``folder`` were written.

    Args:
        args: With ``-v`` each file has a line.
        folder: The folder.
        files: The names, the one to open first.
        first: What that one shows.

    """
    lines = [f"wrote {folder / files[0]}: {first}  <- open this"]
    if args.verbose:
        return "\n".join([*lines, *(f"      {folder / name}" for name in files[1:])])
    there = "" if folder == Path() else f" in {folder}"
    return "\n".join(lines + _paragraph(f"and{there}: ", list(files[1:])))


def removed(args: argparse.Namespace, folder: Path, names: Sequence[str]) -> str:
    """Return that files of an older run were removed; with ``-v`` which ones."""
    several = f"{len(names)} file{'s' * (len(names) > 1)}"
    line = f"removed {several} of the run before from {folder}"
    return "\n".join([line, *_paragraph("", list(names))]) if args.verbose else line


def _paragraph(start: str, names: list[str]) -> list[str]:
    return textwrap.wrap(
        start + ", ".join(_grouped(names)),
        WIDTH,
        initial_indent=" " * 6,
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _grouped(names: Iterable[str]) -> list[str]:
    """Return ``names`` with those of three or more heads as the first … the last."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_OF_A_HEAD.sub(r"\1\3", name), []).append(name)
    return [
        word
        for same in groups.values()
        for word in ([f"{same[0]} … {same[-1]}"] if len(same) > 2 else same)
    ]


def next_command(args: argparse.Namespace, *parts: object) -> str:
    """Return a line with the command that comes next, for the model and reading of this run."""
    words = [_as_argument(part) for part in parts]
    names = (*_MODEL, *_READING, *_SHOWN.get(words[0], ()))
    return f"next: {shlex.join(['dinov2-attn', *words, *_options(args, names)])}"


def _as_argument(part: object) -> str:
    """Return a path so that it is not read as an option."""
    return f"./{part}" if isinstance(part, Path) and str(part).startswith("-") else str(part)


def _options(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    given = []
    for action in args.parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in names and value != action.default:
            option = action.option_strings[-1]
            values = [value, *_second(args, action.dest)]
            given += [option] if value is True else [f"{option}={_typed(one)}" for one in values]
    size = getattr(args, "image_size", None) or []
    lengths = [one for one in size if one.isdecimal()]
    return given + (["--image-size", *lengths] if lengths else [])


def _typed(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _second(args: argparse.Namespace, name: str) -> list[Any]:
    """Return the value that an option has for the second of two models, if it has one."""
    given: dict[str, Any] = getattr(args, "second", {})
    return [given[name]] if name in given else []


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a run as values of JSON, for its record.

    What is given for each of two models is a list.
    """
    return {
        name: [value, *two]
        if (two := _second(args, name))
        else str(value)
        if isinstance(value, Path)
        else value
        for name, value in sorted(vars(args).items())
        if name not in _OWN
    }


def open_file(path: Path) -> None:
    """Open ``path`` with the program that this desktop has for it."""
    try:
        if not _open(path.resolve()):
            log.warning("no program opens %s here", path)
    except (OSError, webbrowser.Error) as error:
        log.warning("%s cannot be opened: %s", path, error)


def _open(path: Path) -> bool:
    if sys.platform == "win32":
        os.startfile(path)
        return True
    opener = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
    if opener is None:
        return webbrowser.open(path.as_uri())
    done = subprocess.run([opener, path], check=False, stdout=sys.stderr)
    return done.returncode == 0
