"""Filling a model with the weights of a file, whatever they were saved from, or not at all."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_attn.apps.weights.architecture import describe
from dinov2_attn.apps.weights.folders import some
from dinov2_attn.apps.weights.heads import require_as_stated
from dinov2_attn.apps.weights.layouts import Backbone, find_backbone, plain
from dinov2_attn.apps.weights.reading import Checkpoint, read, read_mapping
from dinov2_attn.errors import InvalidInputError, UnreadableFileError

log = logging.getLogger(__name__)

# What parameters are saved in. Whole and complex numbers would become one of these in silence.
_FLOATING = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def load_checkpoint(
    model: nn.Module,
    path: str | Path | Mapping[str, Any],
    *,
    key: str | None = None,
    interpolate_pos_embed: bool = False,
) -> tuple[str, ...]:
    """Fill ``model``, one of upstream's vision transformers, with the weights in a file.

    The file may be by ``torch.save``, of which tensors and plain data are read and no code
    is run, or by safetensors. The weights may be bare or in nested dicts, below names such
    as ``teacher.backbone.``, saved from within DDP or ``torch.compile``, their blocks flat
    or in chunks, whichever ``model`` has. Names and layouts of transformers and timm are
    converted. ``path`` may be a folder by ``save_pretrained``, with parts or without, or in
    place of a file what it holds: a state dict, nested or not.

    If there are several models, ``key`` names the one to take (``student``, ``model_ema``).
    Else it is the teacher, which is what upstream evaluates, else a moving average
    (``model_ema``, ``state_dict_ema``), else the one there is.

    Strict: each parameter is found, with its shape, or it is an error; so is a tensor of
    the backbone that ``model`` has not. Of this there is one exception: a ``mask_token`` that
    the file has not becomes zeros, which the log says. Without masks it is not used. What a
    file beside the weights says (heads, epsilon) has to be so in ``model``. Floating numbers
    are converted to the model's. Where the file has a positional embedding for another square
    of patches, that is an error too, unless ``interpolate_pos_embed``: then it is resized to
    the model's by upstream's own method, which does so for images of another size in each
    pass: bicubic, with the ``interpolate_antialias`` and ``interpolate_offset`` of ``model``.

    Returns what was left out, each part by its name in the file: ``student``,
    ``teacher.dino_head``, ``optimizer``, a classifier's ``head``; ``()`` if the file holds the
    backbone alone.

    Raises ``UnreadableFileError`` for a file that is no checkpoint, does not fit or is a shard of
    FSDP, ``UnavailableError`` for safetensors without their library and ``InvalidInputError`` for a
    model on the meta device, one that the file contradicts, or an unknown ``key``. ``model``
    is then as it was.
    """
    if isinstance(path, nn.Module):
        raise InvalidInputError("a path or a mapping", "a module", "Pass its state_dict().")
    checkpoint = read_mapping(path) if isinstance(path, Mapping) else read(path)
    return fill(model, checkpoint, key=key, interpolate_pos_embed=interpolate_pos_embed)


def fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    key: str | None = None,
    interpolate_pos_embed: bool = False,
) -> tuple[str, ...]:
    """Do as ``load_checkpoint`` does, with a file that was read."""
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise InvalidInputError(
            "a model with memory for its weights",
            "one on the meta device",
            "Call model.to_empty(device='cpu') first.",
        )
    backbone = find_backbone(checkpoint, {plain(name) for name in state}, key)
    zeros = _unused(state, backbone.weights)
    weights = {**zeros, **backbone.weights}
    if interpolate_pos_embed:
        weights.update(_resized(model, weights))
    expected = {plain(name): tensor for name, tensor in state.items()}
    differences = _differences(expected, weights)
    if differences:
        raise _misfit(checkpoint, backbone, expected, differences)
    require_as_stated(model, checkpoint)
    model.load_state_dict({name: weights[plain(name)] for name in state})
    log.info("%s: took %s%s", checkpoint.path, backbone.root or "all", _without(backbone))
    for name in zeros:
        log.info("%s is not in the file: set to zeros, which only a pass with masks reads", name)
    return backbone.left_out


def _unused(state: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros for mask tokens that are not found beside a CLS token: upstream's own start."""
    zeros = {}
    for name, tensor in state.items():
        key = plain(name)
        root, _, leaf = key.rpartition(".")
        beside = f"{root}.cls_token" if root else "cls_token"
        if leaf == "mask_token" and key not in found and beside in found:
            zeros[key] = torch.zeros_like(tensor, device="cpu")
    return zeros


def _without(backbone: Backbone) -> str:
    return f", left out {', '.join(backbone.left_out)}" if backbone.left_out else ""


def _misfit(
    checkpoint: Checkpoint,
    backbone: Backbone,
    expected: Mapping[str, Tensor],
    differences: list[str],
) -> UnreadableFileError:
    theirs, ours = describe(backbone.weights), describe(expected)
    next_step = "Build the model as it was when it was saved."
    if all(" of another square" in difference for difference in differences):
        next_step = "Have it resized with load_checkpoint(…, interpolate_pos_embed=True)."
    elif advice := _layer_scale(backbone.weights, expected):
        next_step = advice
    elif theirs and theirs != ours:
        next_step = f"It holds {theirs}: build that in place of {ours or 'this model'}."
    below = f", below {backbone.root}," if backbone.root else ""
    return UnreadableFileError(
        "a checkpoint that fits the model key by key",
        f"{checkpoint.path}{below} with {'; '.join(differences)}",
        next_step,
    )


def _layer_scale(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Return what to do where LayerScale is all that one of the two has and the other has not."""
    apart = set(found) ^ set(expected)
    scales = {key for key in {*found, *expected} if key.endswith((".ls1.gamma", ".ls2.gamma"))}
    if not apart or apart != scales:
        return None
    value = "1.0" if apart <= set(found) else "None"
    return f"Build the model with init_values={value}, as it was when it was saved."


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    both = [key for key in expected if key in found]
    reshaped = [key for key in both if found[key].shape != expected[key].shape]
    squares = [key for key in reshaped if _another_square(key, found[key], expected[key])]
    kinds = {
        "missing": [key for key in expected if key not in found],
        "left over": [key for key in found if key not in expected],
        "of another square of patches": [_shapes(key, found, expected) for key in squares],
        "of another shape": [
            _shapes(key, found, expected) for key in reshaped if key not in squares
        ],
        "of another kind": [
            f"{key} ({found[key].dtype}, {found[key].layout}, {found[key].device})"
            for key in both
            if not _fits(found[key], expected[key])
        ],
    }
    return [f"{len(keys)} {kind}: {some(keys)}" for kind, keys in kinds.items() if keys]


def _shapes(key: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    return f"{key} {tuple(found[key].shape)} for {tuple(expected[key].shape)}"


def _fits(found: Tensor, expected: Tensor) -> bool:
    """Say whether ``found`` is dense, in memory and of numbers that ``expected`` is made of."""
    alike = found.dtype == expected.dtype or {found.dtype, expected.dtype} <= _FLOATING
    return alike and found.layout == torch.strided and not found.is_meta


# Positional embeddings


def _another_square(key: str, found: Tensor, expected: Tensor) -> bool:
    """Say whether upstream's interpolation leads from the one to the other."""
    return (
        key.rpartition(".")[2] == "pos_embed"
        and found.ndim == expected.ndim == 3
        and (found.shape[0], found.shape[2]) == (expected.shape[0], expected.shape[2])
        and all(_side(tensor) ** 2 == tensor.shape[1] - 1 > 0 for tensor in (found, expected))
        and _fits(found, expected)
    )


def _side(pos_embed: Tensor) -> int:
    return math.isqrt(max(0, pos_embed.shape[1] - 1))


def _resized(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the positional embeddings that are for another square, for the model's own."""
    resized = {}
    for name, parameter in model.named_parameters():
        key = plain(name)
        theirs = weights.get(key, parameter)
        if theirs.shape != parameter.shape and _another_square(key, theirs, parameter):
            transformer = model.get_submodule(name.rpartition(".")[0])
            resized[key] = _interpolate(transformer, theirs, parameter)
    return resized


@torch.no_grad()
def _interpolate(transformer: Any, theirs: Tensor, ours: Tensor) -> Tensor:
    # A copy, so that upstream's method reads this embedding and the model keeps its own.
    stand_in = copy.copy(transformer)
    stand_in._parameters = {**transformer._parameters, "pos_embed": nn.Parameter(theirs)}
    side = _side(ours)
    pixels = side * transformer.patch_size
    try:
        # Of its first argument, the tokens of an image, it reads shape and dtype.
        resized: Tensor = stand_in.interpolate_pos_encoding(ours, pixels, pixels)
    except AssertionError as error:  # some revisions miss some sizes by a rounding error
        raise InvalidInputError(
            f"a positional embedding that this upstream can resize to {side} × {side} patches",
            f"one of {_side(theirs)} × {_side(theirs)}",
            "Build the model with another img_size.",
        ) from error
    log.info("pos_embed: %d tokens resized to %d", theirs.shape[1], ours.shape[1])
    return resized
