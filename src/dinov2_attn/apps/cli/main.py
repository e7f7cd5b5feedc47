"""The program ``dinov2-attn``: its subcommands, its log and its exit status."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dinov2_attn import __version__
from dinov2_attn.apps.cli import demo, doctor, explore, extract, heatmap, verify
from dinov2_attn.errors import Dinov2AttnError, SuspiciousRangeWarning

PROGRAM = "dinov2-attn"
COMMANDS = (demo, heatmap, explore, extract, verify, doctor)

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on ``argv`` and return its exit status.

    0: all done; 1: inputs failed and were reported, all others are done; 2: an error before
    the first input; 130: interrupted. argparse exits by itself, with 2 for bad arguments.
    """
    args = _parser().parse_args(argv)
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
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="See, store and check the attention weights of DINOv2."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(subparsers)
    return parser


class _Lines(logging.Formatter):
    """``dinov2-attn: error: …``, the form of argparse's own complaints, further lines indented."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).replace("\n", "\n  ")
        return f"{PROGRAM}: {record.levelname.lower()}: {text}"


def _configure_log() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("dinov2_attn").setLevel(logging.INFO)
    # Upstream warns at import that xFormers is missing, in its first years through its
    # logger. Nobody needs xFormers for a picture.
    logging.getLogger("dinov2").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="xFormers is")


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Log what is doubtful about an image as a line of its own, each time."""
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
    """Write what standard output has no letters for (paths may be no text) as Python spells it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
