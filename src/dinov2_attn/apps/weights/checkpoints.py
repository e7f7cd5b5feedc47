"""Fill a model with the weights of a checkpoint, completely or not at all."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_attn.apps.weights.architecture import describe, require_as_configured
from dinov2_attn.apps.weights.files import some
from dinov2_attn.apps.weights.foreign import as_upstreams
from dinov2_attn.apps.weights.layouts import Backbone, find_backbone, plain
from dinov2_attn.apps.weights.reading import Checkpoint, read, read_mapping
from dinov2_attn.errors import InvalidInputError, UnreadableFileError

log = logging.getLogger(__name__)

# The dtypes of parameters. Integers and complex numbers would be cast without a warning.
_FLOATING = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def load_checkpoint(
    model: nn.Module,
    path: str | Path | Mapping[str, object],
    *,
    key: str | None = None,
    interpolate_pos_embed: bool = False,
) -> tuple[str, ...]:
    """Fill a vision transformer with the weights of a checkpoint.

    Files by ``torch.save`` and safetensors are read, and code in them is never run. The weights
    may be in nested dicts, below prefixes such as ``teacher.backbone.``, saved under DDP or
    ``torch.compile``, with or without chunks of blocks. For one of upstream's models names and
    layouts of transformers and timm are converted. A model of these libraries takes the files of
    its own library, by old names and new ones.

    Loading is strict. Every parameter of ``model`` must be in the file with its shape, and every
    tensor of the backbone in the file must be in ``model``. The one exception is ``mask_token``:
    if the file has none, it becomes zeros and the log says so. Only passes with masks use it.
    Values are cast to the dtype of ``model``. Heads and epsilon of a ``config.json`` or
    ``config.yaml`` must be those of ``model``.

    If an error is raised, ``model`` is unchanged.

    Args:
        model: A ``DinoVisionTransformer``, a vision transformer of transformers or timm, or a
            module that contains one.
        path: A file, a folder by ``save_pretrained``, or a state dict, nested or not.
        key: Which of several models in the file to take, such as ``student`` or ``model_ema``. By
            default the teacher, which upstream evaluates, or else a moving average
            (``model_ema``, ``state_dict_ema``).
        interpolate_pos_embed: Whether to resize a positional embedding for another square of
            patches to that of ``model``. Upstream's own method does this (bicubic, with the
            ``interpolate_antialias`` and ``interpolate_offset`` of ``model``). If false, another
            size is an error.

    Returns:
        The parts of the file that were left out, such as ``student``, ``teacher.dino_head``,
        ``optimizer`` or the ``head`` of a classifier.

    Raises:
        UnreadableFileError: If the file is not a checkpoint, is a shard of FSDP, or does not fit
            ``model``.
        UnavailableError: If the library safetensors is needed and missing.
        InvalidInputError: If ``model`` is on the meta device or contradicts the config file, or if
            the file has no model named ``key``.

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
    """Fill ``model`` as ``load_checkpoint`` does, from a checkpoint that is already read."""
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise InvalidInputError(
            "a model with memory for its weights",
            "one on the meta device",
            "Call model.to_empty(device='cpu') first.",
        )
    # One name for what several versions of transformers call differently.
    common = as_upstreams([plain(name) for name in state])
    own = {shared: name for name, shared in common.items()}
    backbone = find_backbone(checkpoint, set(own), key)
    found = {own.get(shared, shared): tensor for shared, tensor in backbone.weights.items()}
    zeros = _unused(state, found)
    weights = {**zeros, **found}
    if interpolate_pos_embed:
        weights.update(_resized(model, weights))
    expected = {plain(name): tensor for name, tensor in state.items()}
    differences = _differences(expected, weights)
    if differences:
        shared = {common[name]: tensor for name, tensor in expected.items()}
        raise _misfit(checkpoint, backbone, shared, differences)
    require_as_configured(model, checkpoint)
    model.load_state_dict({name: weights[plain(name)] for name in state})
    level = logging.INFO if backbone.left_out else logging.DEBUG
    log.log(level, "%s: loaded %s%s", checkpoint.path, backbone.root or "all", _without(backbone))
    for name in zeros:
        log.info("%s is not in the file: set to zeros (only passes with masks use it)", name)
    return backbone.left_out


def _unused(state: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros for mask tokens that the file lacks; upstream initialises them to zero too."""
    zeros = {}
    for name, tensor in state.items():
        key = plain(name)
        root, _, leaf = key.rpartition(".")
        cls_token = f"{root}.cls_token" if root else "cls_token"
        if leaf == "mask_token" and key not in found and cls_token in found:
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
        next_step = "Resize it with load_checkpoint(…, interpolate_pos_embed=True)."
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
    """Return the advice for models that differ in LayerScale only."""
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
    """Return whether ``found`` is dense, in memory, and of a dtype that casts to ``expected``'s."""
    alike = found.dtype == expected.dtype or {found.dtype, expected.dtype} <= _FLOATING
    return alike and found.layout == torch.strided and not found.is_meta


# Positional embeddings


def _another_square(key: str, found: Tensor, expected: Tensor) -> bool:
    """Return whether upstream's interpolation can turn one into the other."""
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
    """Return the positional embeddings for another square, resized to those of ``model``."""
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
    # A copy with the other embedding, so that the model keeps its own.
    stand_in = copy.copy(transformer)
    stand_in._parameters = {**transformer._parameters, "pos_embed": nn.Parameter(theirs)}
    side = _side(ours)
    pixels = side * transformer.patch_size
    try:
        # Of its first argument, the tokens of an image, it uses shape and dtype only.
        resized: Tensor = stand_in.interpolate_pos_encoding(ours, pixels, pixels)
    except AssertionError as error:  # rounding in some revisions misses some sizes
        raise InvalidInputError(
            f"a positional embedding that this upstream can resize to {side} × {side} patches",
            f"one of {_side(theirs)} × {_side(theirs)}",
            "Build the model with another img_size.",
        ) from error
    log.info("pos_embed: %d tokens resized to %d", theirs.shape[1], ours.shape[1])
    return resized
