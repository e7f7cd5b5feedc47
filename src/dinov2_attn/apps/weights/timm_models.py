"""Vision transformers of timm by their names, with timm's weights or those of a file."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from dinov2_attn.apps.weights.reading import read
from dinov2_attn.errors import InvalidInputError, UnavailableError, UnreadableFileError, in_one_line


def build(name: str, weights: Path | None = None, *, pretrained: bool = True) -> nn.Module:
    """Build a model of timm, in eval mode. Images may have any size if the model allows it.

    Args:
        name: Its name in timm, such as ``vit_small_patch14_dinov2.lvd142m``.
        weights: A checkpoint of this model. Code in it is not run.
        pretrained: Whether timm loads its own weights, if there are no others.

    Raises:
        UnavailableError: If timm is missing, or its weights cannot be downloaded.
        InvalidInputError: If timm knows no such model.
        UnreadableFileError: If the checkpoint is of another model.

    """
    timm = _timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(pretrained=pretrained), 3)
        raise InvalidInputError(
            "the name of a model of timm",
            repr(name),
            f"Try {' or '.join(near)}." if near else "timm.list_models() lists the names.",
        )
    try:
        model = _created(timm.create_model, name, pretrained and weights is None)
    except Exception as error:  # errors of network, cache and model pass through timm
        raise UnavailableError(
            f"timm's {name}",
            f"{type(error).__name__}: {in_one_line(error)[:200]}",
            "Connect to the network, or give a file by --weights PATH. --random-weights runs "
            "without, but its maps mean nothing.",
        ) from error
    if weights is not None:
        _fill(model, weights, name)
    return model.eval()


def normalisation(model: Any) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and deviation of the images of its training, as far as timm knows them."""
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = config.get("mean"), config.get("std")
    return (tuple(mean) if mean else None), (tuple(std) if std else None)


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise UnavailableError(
            "the library timm", str(error), "Install it with `pip install timm`."
        ) from error
    return timm


def _created(create: Callable[..., nn.Module], name: str, pretrained: bool) -> nn.Module:
    try:
        return create(name, pretrained=pretrained, dynamic_img_size=True)
    except TypeError:  # models of one size do not know the argument
        return create(name, pretrained=pretrained)


def _fill(model: nn.Module, path: Path, name: str) -> None:
    tensors = dict(read(path).tensors)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UnreadableFileError(
            f"weights of timm's {name}, under its own names",
            f"{path}, which has others ({in_one_line(error)[:200]})",
            "Name the model that was saved there.",
        ) from error
