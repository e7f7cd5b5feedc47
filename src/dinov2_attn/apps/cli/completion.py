"""Completion of commands, options and files in a shell, by the library shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from dinov2_attn.errors import UnavailableError

SHELLS = ("bash", "zsh")

_FILES = ("output", "weights", "images", "sources", "json", "junit")
_FOLDERS = ("repo", "folder")


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that completes the program of ``parser`` in ``shell``.

    Raises:
        UnavailableError: If the library shtab is missing.

    """
    try:
        import shtab
    except ImportError as error:
        raise UnavailableError(
            "the library shtab",
            str(error),
            "Install it with `pip install 'dinov2-attn[completion]'`.",
        ) from error
    for action in _actions(parser):
        complete: Any = action
        if action.dest in _FILES:
            complete.complete = shtab.FILE
        elif action.dest in _FOLDERS:
            complete.complete = shtab.DIRECTORY
    return str(shtab.complete(parser, shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for own in action.choices.values():
                yield from _actions(own)
