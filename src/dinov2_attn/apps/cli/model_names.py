"""The names of models on the command line: those of Meta's hubs, and of timm."""

from __future__ import annotations

import argparse
import difflib
from argparse import ArgumentTypeError

from dinov2_attn.apps.demo.load import PATH
from dinov2_attn.apps.weights import dinov3
from dinov2_attn.apps.weights.models import ARCHS, CLASSIFIERS, HUB
from dinov2_attn.errors import InvalidInputError

TIMM = "timm:"
# The small model that ships with this package.
DEMO = "demo"
NAMES = (*HUB, *CLASSIFIERS, *dinov3.ARCHS, DEMO)


def model_name(text: str) -> str:
    """Read a name of Meta's hubs, or ``timm:NAME``."""
    if text in NAMES or (text.startswith(TIMM) and text != TIMM):
        return text
    raise ArgumentTypeError(
        f"expected a name of Meta's hub, or timm:NAME; found {text!r}. {_meant(text)}"
    )


def architecture(text: str) -> str:
    """Read the name of an architecture."""
    known = (*ARCHS, *dinov3.ARCHS)
    if text in known:
        return text
    if hub := next((name for name in (text, f"dinov2_{text}") if name in HUB), None):
        hint = f"A name of the hub is given by --model {hub}"
    else:
        near = difflib.get_close_matches(text, known, 1)
        hint = f"Try {near[0]}" if near else f"Choose from {', '.join(known)}"
    raise ArgumentTypeError(f"invalid choice: {text!r}. {hint}.")


def _meant(text: str) -> str:
    if text in ARCHS:
        return f"That is a name for --arch: --arch {text}."
    if "/" in text:
        return f"A downloaded model of Hugging Face is given by --weights {text}."
    for name in (f"dinov2_{text}", f"dinov3_{text}", *difflib.get_close_matches(text, NAMES, 1)):
        if name in NAMES:
            return f"Try {name}."
    return f"Choose from {', '.join(NAMES)}."


def chosen(args: argparse.Namespace) -> argparse.Namespace:
    """Return ``args`` with what ``--model`` stands for, and whose model it is.

    Raises:
        InvalidInputError: If other options say what the name says, or need a checkpoint.

    """
    name = args.model
    is_timm = name is not None and name.startswith(TIMM)
    found = argparse.Namespace(**vars(args))
    found.classifier = CLASSIFIERS.get(name)
    backbone = found.classifier or name
    if backbone in HUB:
        _refuse(args, f"--model {name}", ("arch", "registers", "patch_size"))
        found.arch, found.registers = HUB[backbone]
        found.patch_size = 14
    elif name == DEMO:
        _refuse(args, "--model demo", _SAID_BY_DEMO)
        found.model, found.weights = None, str(PATH)
    elif is_timm:
        others = ("arch", "registers", "patch_size", "num_heads", "key", "repo")
        _refuse(args, f"--model {name}", others)
    elif name is not None:
        _refuse(args, f"--model {name}", ("arch",))
        found.arch = name
    found.model_is_timm = is_timm
    found.model_is_dinov3 = found.arch in dinov3.ARCHS
    if found.model_is_dinov3:
        _refuse(args, f"--{'model' if name else 'arch'} {found.arch}", _SAID_BY_DINOV3)
    _check_for_weights(found)
    return found


_SAID_BY_DEMO = (
    "arch",
    "registers",
    "patch_size",
    "num_heads",
    "key",
    "weights",
    "random_weights",
)
_SAID_BY_DINOV3 = ("patch_size", "num_heads", "registers")


def _refuse(args: argparse.Namespace, alone: str, others: tuple[str, ...]) -> None:
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(args, name)]
    if given:
        raise InvalidInputError(
            f"{alone} alone, which says all of the model",
            ", ".join(given),
            "Leave them out: the name tells.",
        )


def _check_for_weights(args: argparse.Namespace) -> None:
    """Raise ``InvalidInputError`` for options of a checkpoint without one."""
    if args.num_heads is not None and args.weights is None:
        raise InvalidInputError(
            "--num-heads together with --weights PATH",
            "no checkpoint",
            "Leave it out: a name tells.",
        )
    if args.key is not None and args.weights is None:
        raise InvalidInputError(
            "--key together with --weights PATH", "no checkpoint", "Leave it out."
        )
