"""The program ``dinov2-attn``: its subcommands, its log and its exit status."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from dinov2_attn import __version__
from dinov2_attn.apps.cli import demo, doctor, explore, extract, figure, heatmap, verify
from dinov2_attn.errors import Dinov2AttnError, SuspiciousRangeWarning

PROGRAM = "dinov2-attn"
COMMANDS = (demo, heatmap, figure, explore, extract, verify, doctor)

# Options by names that one may look for: other commands or tools call them so.
OTHER_NAMES = {
    "--outliers": "--artifacts",
    "--artifacts": "--outliers",
    "--sample": "--example",
    "--block": "--layers",
    "--token": "--queries",
}

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on ``argv`` and return its exit status.

    The status is 0 if all is done, 1 if some inputs failed and were reported, 2 for an error
    before the first input, and 130 for an interruption. For bad arguments argparse exits with 2.
    """
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        chosen = getattr(args, "parser", parser)
        chosen.error(_unknown(unknown, chosen))
    if "run" not in args:
        parser.print_help()
        return 0
    _configure_log()
    _configure_output()
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        with _warnings_as_lines():
            return run(args)
    except Dinov2AttnError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; what was written is complete")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add(subparsers)
    for own in subparsers.choices.values():
        own.set_defaults(parser=own)
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints name the option that is meant."""

    def error(self, message: str) -> NoReturn:
        """Report a bad argument and exit with status 2."""
        if message.startswith("argument --layers: expected one argument") and _has(
            self, "--overview"
        ):
            message += " (such as 0,5,11; --overview draws layers by heads)"
        super().error(message)


def _unknown(arguments: list[str], parser: argparse.ArgumentParser) -> str:
    """Return what is wrong with ``arguments`` that ``parser`` does not know."""
    given = [one.partition("=")[0] for one in arguments if one.startswith("--")]
    hints = [f"{name}: did you mean {near}?" for name in given if (near := _near(name, parser))]
    return " ".join([f"unrecognized arguments: {' '.join(arguments)}.", *hints])


def _near(name: str, parser: argparse.ArgumentParser) -> str | None:
    options = [option for action in parser._actions for option in action.option_strings]
    if (other := OTHER_NAMES.get(name)) in options:
        return other
    return next(iter(difflib.get_close_matches(name, options, 1)), None)


def _has(parser: argparse.ArgumentParser, option: str) -> bool:
    return any(option in action.option_strings for action in parser._actions)


class _Lines(logging.Formatter):
    """``dinov2-attn: error: …``, the form of argparse's errors, further lines indented."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).replace("\n", "\n  ")
        return f"{PROGRAM}: {record.levelname.lower()}: {text}"


def _configure_log() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("dinov2_attn").setLevel(logging.INFO)
    # Upstream warns at import that xFormers is missing, in its first years through its
    # logger. Pictures do not need xFormers.
    logging.getLogger("dinov2").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="xFormers is")


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Log a warning about the range of an image as one line, for every image."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", SuspiciousRangeWarning)
        show = warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, SuspiciousRangeWarning):
                log.warning("%s", message)
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = tell
        yield


def _configure_output() -> None:
    """Write characters that standard output cannot encode as Python escapes them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
