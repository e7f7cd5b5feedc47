"""Saying what a tensor is that a copy returned as attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dinov2_attn.proof.conformance.kernel_call import Calls, KernelCall
from dinov2_attn.proof.verify.offers import path_of
from dinov2_attn.proof.verify.recipes import (
    RECIPES,
    REDUCTIONS,
    WEIGHTS,
    Recipe,
    fitted_scale,
    from_projection,
)

# Relative to the largest value: between these and a wrong recipe lie orders of magnitude.
_RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF = 3e-2


@dataclass(frozen=True)
class Truth:
    """What a tensor is compared with.

    Attributes:
        calls: The kernel calls by attention module, in the order of the layers.
        expected: The attention module whose weights one expects.
        outputs: What modules returned, with their paths.

    """

    calls: Calls
    expected: str
    outputs: Sequence[tuple[str, Tensor]]


@dataclass(frozen=True)
class Said:
    """What a tensor is: its name, the largest difference, and the sums of its rows."""

    name: str
    gap: float | None = None
    sums: tuple[float, float] | None = None
    is_weights: bool = False
    note: str = ""

    @classmethod
    def joined(cls, same: Sequence[Said]) -> Said:
        """Return one for several of the same name."""
        gaps = [one.gap for one in same if one.gap is not None]
        sums = [one.sums for one in same if one.sums is not None]
        return cls(
            same[0].name,
            max(gaps, default=None),
            (min(low for low, _ in sums), max(high for _, high in sums)) if sums else None,
            same[0].is_weights,
            same[0].note,
        )

    def __str__(self) -> str:
        text = self.name if self.gap is None else f"{self.name}{_figure(self.gap)}"
        if self.sums is None or all(abs(total - 1) < 1e-2 for total in self.sums):
            return text
        low, high = (f"{total:.3g}".replace("-", "−") for total in self.sums)
        return f"{text}: rows sum to {low} … {high}"


def describe(found: Tensor, truth: Truth) -> Said:
    """Return what ``found`` is."""
    candidates = (_as_weights, _as_recipe, _as_features, _as_projected, _as_scaled)
    for candidate in candidates:
        said = candidate(found, truth)
        if said is not None:
            return said
    return Said(f"unknown: shape {tuple(found.shape)}", sums=_sums(found))


def close(found: Tensor, expected: Tensor) -> bool:
    """Return whether both are the same up to rounding."""
    return found.shape == expected.shape and _gap(found, expected) is not None


def _as_weights(found: Tensor, truth: Truth) -> Said | None:
    for name, call in _calls(truth):
        match = _match(found, WEIGHTS, call)
        if match is None:
            continue
        words, gap = match
        here = name == truth.expected
        layer = "the kernel's weights" if here else f"weights of another layer, {path_of(name)}"
        if not words:
            layer = f"equal to {layer}" if here else layer
        return Said(f"{words} of {layer}" if words else layer, gap, is_weights=here)
    return None


def _as_features(found: Tensor, truth: Truth) -> Said | None:
    named = [path for path, output in truth.outputs if close(found, output)]
    if named:
        attending = {path_of(name) for name in truth.calls}
        path = min(named, key=lambda path: (path not in attending, len(path)))
        return Said(f"features, not weights: the output of {path or 'the module'}")
    for name, call in _calls(truth):
        x = call.output
        forms = [x, x.transpose(1, 2), x.transpose(1, 2).flatten(2)] if x.ndim == 4 else [x]
        if any(close(found, form) for form in forms):
            return Said(f"features, not weights: the kernel's output in {path_of(name)}")
    return None


def _as_recipe(found: Tensor, truth: Truth) -> Said | None:
    for name, call in _calls(truth):
        for recipe in RECIPES[1:]:
            match = _match(found, recipe, call)
            if match is None:
                continue
            text = f"{match[0]} of {recipe.name}" if match[0] else recipe.name
            if name != truth.expected:
                text += f", of another layer, {path_of(name)}"
            return Said(text, sums=_sums(found), note=recipe.note)
    return None


def _as_projected(found: Tensor, truth: Truth) -> Said | None:
    """Compare with weights of queries and keys before what follows the projection."""
    for name, call in _calls(truth):
        projected = dict(truth.outputs).get(f"{path_of(name)}.qkv".lstrip("."))
        before = None if projected is None else from_projection(call, projected)
        if before is not None and (match := _match(found, WEIGHTS, before)) is not None:
            text = "weights without the norm or rotation behind the projection"
            return Said(f"{match[0]} of {text}" if match[0] else text)
    return None


def _as_scaled(found: Tensor, truth: Truth) -> Said | None:
    for _, call in _calls(truth):
        scale = fitted_scale(call, found)
        if scale is None:
            continue
        recipe = Recipe("", partial(_at, scale=scale))
        if _match(found, recipe, call) is not None:
            return Said(f"weights with another scale: {scale:.3g} in place of {call.scale:.3g}")
    return None


def _at(call: KernelCall, scale: float) -> Tensor | None:
    if call.query is None or call.key is None:
        return None
    logits = call.query @ call.key.mT * scale
    return (logits if call.bias is None else logits + call.bias).softmax(-1)


def _calls(truth: Truth) -> Iterator[tuple[str, KernelCall]]:
    """Yield the calls of the expected module first."""
    for name in sorted(truth.calls, key=lambda name: name != truth.expected):
        for call in truth.calls[name]:
            yield name, call


def _match(found: Tensor, recipe: Recipe, call: KernelCall) -> tuple[str, float] | None:
    """Return in which form ``found`` is what ``recipe`` makes, and the difference."""
    try:
        full = recipe.formula(call)
    except RuntimeError:  # the shapes of this call do not go together in it
        return None
    if full is None:
        return None
    for reduction, reduce in REDUCTIONS.items():
        if full.ndim < 4 and "heads" in reduction:
            continue
        for part, some in _parts(reduce(full), found.shape):
            gap = _gap(found, some)
            if gap is not None:
                return ", ".join(filter(None, (part, reduction))), gap
    return None


def _parts(full: Tensor, shape: torch.Size) -> Iterator[tuple[str, Tensor]]:
    """Yield the parts of a matrix that have ``shape``: all, row 0, the last columns."""
    length = full.shape[-1]
    for image, some in (("", full), ("first image", full[0])):
        parts = [("", some), ("row 0", some[..., 0, :])]
        for columns in {shape[-1], shape[-2:].numel()} if shape else ():
            skipped = length - columns
            if skipped > 0 and columns:
                parts += [
                    (f"row 0 without {skipped} columns", some[..., 0, skipped:]),
                    (f"all without {skipped} columns", some[..., skipped:]),
                    (f"all without {skipped} tokens", some[..., skipped:, skipped:]),
                ]
        for words, part in parts:
            if part.numel() == shape.numel():
                yield ", ".join(filter(None, (words, image))), part.reshape(shape)


def _gap(found: Tensor, expected: Tensor) -> float | None:
    """Return the largest difference, ``None`` if it is more than rounding."""
    if not found.numel() or found.is_complex():
        return None
    a, b = found.detach().double(), expected.detach().double()
    same = (a == b) | ((a - b).abs() <= _RELATIVE.get(found.dtype, _HALF) * _largest(b))
    if not bool(same.all()):
        return None
    return float((a - b).abs().nan_to_num(0).max())


def _largest(tensor: Tensor) -> Tensor:
    return (
        tensor.abs()[tensor.isfinite()].amax() if tensor.isfinite().any() else tensor.new_ones(())
    )


def _sums(found: Tensor) -> tuple[float, float] | None:
    if found.ndim < 2 or not found.numel():
        return None
    sums = found.detach().double().sum(-1)
    return float(sums.min()), float(sums.max())


def _figure(gap: float) -> str:
    """Write `` to 3e-7``, as one writes it by hand."""
    if not gap:
        return " bit for bit"
    mantissa, exponent = f"{gap:.0e}".split("e")
    return f" to {mantissa}e{int(exponent)}"
