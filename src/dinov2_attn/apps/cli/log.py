"""The log of the program, as lines on standard error."""

from __future__ import annotations

import argparse
import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from dinov2_attn.errors import SuspiciousRangeWarning, shown

PROGRAM = "dinov2-attn"

log = logging.getLogger(__name__)


class _Lines(logging.Formatter):
    """``dinov2-attn: error: …``, the form of argparse's errors, further lines indented."""

    def format(self, record: logging.LogRecord) -> str:
        text = shown(super().format(record)).replace("\n", "\n  ")
        return f"{PROGRAM}: {record.levelname.lower()}: {text}"


def configure(args: argparse.Namespace) -> None:
    """Write the log to standard error: more with ``-v``, warnings and errors with ``-q``."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    level = logging.DEBUG if getattr(args, "verbose", False) else logging.INFO
    if getattr(args, "quiet", False):
        level = logging.WARNING
    logging.getLogger("dinov2_attn").setLevel(level)
    # Upstream warns at import that xFormers is missing, in its first years through its
    # logger. Pictures do not need xFormers.
    logging.getLogger("dinov2").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="xFormers is")
    # timm's weights come through it. Without a network it warns of every attempt.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
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


@contextlib.contextmanager
def held_back(name: str) -> Iterator[None]:
    """Log what the logger ``name`` says in this block at its end, or when it raises."""
    logger, held = logging.getLogger(name), list[logging.LogRecord]()

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)
        for record in held:
            logger.handle(record)
