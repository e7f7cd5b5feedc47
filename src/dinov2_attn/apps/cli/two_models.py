"""Two models on one command line: options of a model that are given twice."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinov2_attn.apps.cli import early
from dinov2_attn.apps.cli.model_names import chosen
from dinov2_attn.apps.cli.model_options import Loaded, load_model
from dinov2_attn.errors import InvalidInputError

# Options that may be given twice, for two models.
NAMES = ("weights", "model", "arch", "key", "patch_size", "num_heads", "repo")
LETTERS = ("A", "B")


def allow(parser: argparse.ArgumentParser) -> None:
    """Let ``parser`` take two models: each option of ``NAMES`` once for both, or once for each."""
    for action in parser._actions:
        if action.dest in NAMES:
            action.__class__ = _Twice
            action.help = f"{action.help} Given twice, it compares two models."
    parser.set_defaults(second={})


class _Twice(argparse._StoreAction):
    """Store the first value as usual, and the second one in ``second``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        second: dict[str, Any] = getattr(namespace, "second", {})
        if self.dest in second:
            raise argparse.ArgumentError(self, "given three times. Two models can be compared.")
        if getattr(namespace, self.dest) is None:
            setattr(namespace, self.dest, values)
        else:
            namespace.second = {**second, self.dest: values}


def are_two(args: argparse.Namespace) -> bool:
    """Return whether ``args`` name two models."""
    return bool(getattr(args, "second", None))


def each(args: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the arguments of each of the models. An option that is given once is for both."""
    if not are_two(args):
        return [args]
    both = [argparse.Namespace(**{**vars(args), "second": {}}) for _ in LETTERS]
    vars(both[1]).update(args.second)
    if args.repo is not None and "repo" not in args.second:
        # A checkout is of DINOv2 or of DINOv3.
        dinov3 = [chosen(one).model_is_dinov3 for one in both]
        if any(dinov3) and not all(dinov3):
            both[dinov3.index(False)].repo = None
    return both


def check_models(args: argparse.Namespace, queries: Sequence[str], layers: Any) -> None:
    """Raise what is wrong with the options of each model, before torch is imported."""
    for one in each(args):
        early.check_model(one)
        early.check_tokens(one, queries, layers)


def load_models(
    args: argparse.Namespace, load: Callable[[argparse.Namespace], Loaded] = load_model
) -> list[Loaded]:
    """Return the models, with names that differ."""
    both = each(args)
    loaded = [load(one) for one in both]
    if len(loaded) == 1:
        return loaded
    names = [_with_key(one, model.name, args) for one, model in zip(both, loaded, strict=True)]
    if names[0] == names[1]:
        names = _with_folders(names, [one.weights for one in both])
    return [replace(model, name=name) for model, name in zip(loaded, names, strict=True)]


def refuse(args: argparse.Namespace, options: Sequence[str]) -> None:
    """Raise ``InvalidInputError`` if one of the ``options`` is given with two models."""
    given = [f"--{name.replace('_', '-')}" for name in options if getattr(args, name)]
    if are_two(args) and given:
        raise InvalidInputError(
            f"one model with {' and '.join(given)}",
            "two models to compare",
            f"Leave {' and '.join(given)} out, or name one model.",
        )


def warning_of(loaded: Sequence[Loaded]) -> str | None:
    """Return what has to travel with pictures of these models."""
    if len({model.warning for model in loaded}) == 1:
        return loaded[0].warning
    pairs = zip(LETTERS, loaded, strict=False)
    said = [f"{letter}: {model.warning}" for letter, model in pairs if model.warning]
    return " ".join(said) or None


def named(loaded: Sequence[Loaded]) -> str:
    """Return the names of two models in a line."""
    return "; ".join(
        f"{letter}: {model.name}" for letter, model in zip(LETTERS, loaded, strict=True)
    )


def _with_key(one: argparse.Namespace, name: str, args: argparse.Namespace) -> str:
    return f"{name}, {one.key}" if "key" in args.second else name


def _with_folders(names: Sequence[str], paths: Sequence[str | None]) -> list[str]:
    """Return the names with so many folders of their files that they differ."""
    if None in paths or paths[0] == paths[1]:
        return list(names)
    parts = [Path(str(path)).absolute().parts for path in paths]
    for count in range(2, max(map(len, parts)) + 1):
        tails = [Path(*part[-count:]).as_posix() for part in parts]
        if tails[0] != tails[1]:
            return [
                name.replace(Path(str(path)).name, tail)
                for name, path, tail in zip(names, paths, tails, strict=True)
            ]
    return list(names)
