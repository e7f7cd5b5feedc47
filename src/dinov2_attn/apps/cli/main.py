"""The program ``dinov2-attn``: its subcommands, its log and its exit status."""

from __future__ import annotations

import argparse
import io
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence

from dinov2_attn import __version__
from dinov2_attn.apps.cli import (
    demo,
    doctor,
    explore,
    export,
    extract,
    figure,
    heatmap,
    summary,
    verify,
)
from dinov2_attn.apps.cli.complaints import Parser
from dinov2_attn.apps.cli.complaints import unknown as _unknown
from dinov2_attn.apps.cli.completion import SHELLS, completion
from dinov2_attn.apps.cli.log import PROGRAM, configure, warnings_as_lines
from dinov2_attn.errors import Dinov2AttnError
from dinov2_attn.grafting.api import restored

COMMANDS = (demo, heatmap, figure, explore, extract, summary, export, verify, doctor)

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on ``argv`` and return its exit status.

    The status is 0 if all is done, 1 if some inputs failed and were reported, 2 for an error
    before the first input, 130 for an interruption, and 141 if the reader of a pipe has left. For
    bad arguments argparse exits with 2. What it installs is uninstalled at the end.
    """
    _open_streams()
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        refused = getattr(args, "parser", parser)
        refused.error(_unknown(unknown, refused))
    configure(args)
    _configure_output()
    try:
        with warnings_as_lines(), restored():
            status = _run(args, parser)
            sys.stdout.flush()  # here, where a closed pipe is known
            return status
    except Dinov2AttnError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; what was written is complete")
        return 130
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        # Python flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _reader_has_left() -> bool:
    """Return whether standard output is a pipe without a reader."""
    if sys.platform == "win32":
        return True  # it has no poll
    state = select.poll()
    state.register(sys.stdout, select.POLLOUT)
    return any(event & select.POLLERR for _, event in state.poll(0))


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.print_completion is not None:
        print(completion(parser, args.print_completion))
        return 0
    if "run" not in args:
        print(parser.format_help(), end="")  # argparse would hide a closed pipe
        return 0
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Draw, store and verify the attention weights of DINOv2.",
        epilog=f"Run `{PROGRAM} COMMAND --help` for the options and an example of a command.",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"{PROGRAM} {__version__}",
        help="Print the version and exit.",
    )
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        help="Print a script that completes commands, options and files in this shell.",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add(subparsers)
    for name, own in subparsers.choices.items():
        _add_verbosity(own)
        own.set_defaults(parser=own, command=name)
    return parser


def _add_verbosity(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-q", "--quiet", action="store_true", help="Print warnings and errors only.")
    group.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="Print every file, where the code comes from, and what was assumed.",
    )


def _open_streams() -> None:
    """Open the standard streams that are closed, as those of a daemon may be.

    A result would take the place of one, and get what libraries write to it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # until the end


def _configure_output() -> None:
    """Write characters that standard output cannot encode as Python escapes them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
