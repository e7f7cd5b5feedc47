"""What the program says of words that it does not know."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any, NoReturn

from dinov2_attn.errors import shown, shown_name

# Options by names that one may look for: other commands or tools call them so.
OTHER_NAMES = {
    "--outliers": "--artifacts",
    "--artifacts": "--outliers",
    "--sample": "--example",
    "--block": "--layers",
    "--token": "--queries",
    "--out": "--output",
}


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are short and name the word that is meant."""

    def error(self, message: str) -> NoReturn:
        """Report a bad argument and exit with status 2."""
        if message.startswith("argument --layers: expected one argument") and _has(
            self, "--overview"
        ):
            message += " (such as 0,5,11; --overview draws layers by heads)"
        if message.endswith("are required: -o/--output"):
            message += " (such as -o out)"
        self.exit(2, f"usage: {self._short_usage()}\n{self.prog}: error: {shown(message)}\n")

    def _short_usage(self) -> str:
        """Return the usage with what is required, in one line."""
        words = [self.prog]
        for action in self._actions:
            if action.required and action.option_strings:
                words.append(f"{action.option_strings[0]} {action.metavar}")
            elif not action.option_strings:
                words.append(f"{action.metavar}" + " …" * (action.nargs == "*"))
        return f"{' '.join(words)} [options]; {self.prog} --help explains them"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is no choice, with the nearest one."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            raise argparse.ArgumentError(action, f"{error.message}. {_meant(action, value)}") from (
                error
            )


def _meant(action: argparse.Action, value: Any) -> str:
    choices = [str(choice) for choice in action.choices or ()]
    near = difflib.get_close_matches(str(value), choices, 1)
    if near:
        return f"Did you mean {near[0]}?"
    if "heatmap" in choices and Path(str(value)).exists():
        return f"To draw it: dinov2-attn heatmap {value} -o out"
    return f"Try {choices[0]}."


def unknown(arguments: list[str], parser: argparse.ArgumentParser) -> str:
    """Return what is wrong with ``arguments`` that ``parser`` does not know."""
    given = [one.partition("=")[0] for one in arguments if one.startswith("--")]
    hints = [f"{name}: did you mean {near}?" for name in given if (near := _near(name, parser))]
    return " ".join([f"unrecognized arguments: {' '.join(map(shown_name, arguments))}.", *hints])


def _near(name: str, parser: argparse.ArgumentParser) -> str | None:
    options = [option for action in parser._actions for option in action.option_strings]
    if (other := OTHER_NAMES.get(name)) in options:
        return other
    return next(iter(difflib.get_close_matches(name, options, 1)), None)


def _has(parser: argparse.ArgumentParser, option: str) -> bool:
    return any(option in action.option_strings for action in parser._actions)
