"""Artifact tokens: patches that a model uses as memory, found by norm and attention.

Large models store global information in a few patches of little content. The norm of such a
patch is many times that of the others, and its column dominates every map. ``find_artifacts``
finds them; here they are reported. Nothing is changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Generic

import torch
from torch import Tensor

from dinov2_attn.maps import _facts
from dinov2_attn.maps.result import Array, Result, W, as_array

# Tokens that a line of text names.
NAMED = 6

# More than this share of the patches are no artifacts, of which there are 2 or 3 in a hundred.
MOST = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class ArtifactTokens(Result, Generic[W]):
    """The artifact tokens of a batch of images, and the evidence for them.

    Norms decide what is an artifact. Attention alone does not: a patch may receive much for
    its content, so the sinks are a second opinion. One rule makes all masks.

    Attributes:
        mask: Bool ``(B, h, w)``: patches whose norm is above the threshold.
        norms: ``(B, h, w)``: Euclidean norms of the output of block ``layer``, before any
            final LayerNorm; float32 at least.
        layer: int64 ``(B,)``: the block, counted from 0, after which an image's norms are read.
        threshold: ``(B,)``: of the norms of each image.
        from_cls: ``(B, h, w)``: the attention of CLS to each patch in the last block, mean of
            heads.
        from_all: ``(B, h, w)``: the attention to each patch there, mean of heads and of all N
            tokens.
        cls_sinks: Bool ``(B, h, w)``: outliers of ``from_cls``.
        sinks: Bool ``(B, h, w)``: outliers of ``from_all``.

    """

    mask: W
    norms: W
    layer: W
    threshold: W
    from_cls: W
    from_all: W
    cls_sinks: W
    sinks: W

    @property
    def share(self) -> W:
        """The share ``(B,)`` of CLS's attention in the last block that the artifacts hold."""
        from_cls: Any = self.from_cls
        share: W = (from_cls * self.mask).sum((-2, -1))
        return share

    @property
    def suspicious(self) -> W:
        """Bool ``(B,)``: more than one patch, and more than 10 % of them, are flagged."""
        mask: Any = self.mask
        height, width = mask.shape[1:]
        suspicious: W = mask.sum((-2, -1)) > max(1, MOST * height * width)
        return suspicious

    def numpy(self: ArtifactTokens[Tensor]) -> ArtifactTokens[Array]:
        """Return the same with NumPy arrays."""
        arrays: ArtifactTokens[Array] = self._with(as_array)
        return arrays

    def report(self) -> list[dict[str, Any]]:
        """Return one dictionary of JSON's own types for each image.

        Its keys are ``grid`` (h, w), ``layer``, ``threshold``, ``median`` (of the norms),
        ``share``, ``suspicious``, and the lists ``tokens``, ``cls_sinks`` and ``sinks`` of
        patches. Each patch has ``row``, ``col``, ``norm``, ``from_cls`` and ``from_all``. The
        largest norm comes first in ``tokens``, the largest attention in the others. A number
        that is not finite is ``None``.
        """
        own = {f.name: torch.as_tensor(getattr(self, f.name)) for f in fields(self)}
        tensors = ArtifactTokens(**own)
        return [tensors._report(i) for i in range(len(tensors.mask))]

    def describe(self) -> list[str]:
        """Return one line of text for each image: which patches, where, and their attention."""
        return [_in_words(entry) for entry in self.report()]

    def _facts(self) -> dict[str, str]:
        mask: Any = self.mask
        return {
            "images": f"{len(mask)}",
            "grid": _facts.size(tuple(mask.shape[1:])),
            "layer": _facts.values(self.layer),
            "tokens": _facts.values(mask.sum((-2, -1))),
        }

    def _report(self: ArtifactTokens, i: int) -> dict[str, Any]:
        patches = self.norms[i].numel()
        return {
            "grid": list(self.norms.shape[1:]),
            "layer": int(self.layer[i]),
            "threshold": _number(self.threshold[i]),
            "median": _number(median(self.norms[i].reshape(1, patches))[0]),
            "share": _number(self.share[i]),
            "suspicious": bool(self.suspicious[i]),
            "tokens": self._tokens(i, self.mask, self.norms),
            "cls_sinks": self._tokens(i, self.cls_sinks, self.from_cls),
            "sinks": self._tokens(i, self.sinks, self.from_all),
        }

    def _tokens(self: ArtifactTokens, i: int, mask: Tensor, order: Tensor) -> list[dict[str, Any]]:
        places = mask[i].nonzero().tolist()
        places.sort(key=lambda place: -float(order[i][tuple(place)]))
        return [
            {
                "row": row,
                "col": col,
                "norm": _number(self.norms[i, row, col]),
                "from_cls": _number(self.from_cls[i, row, col]),
                "from_all": _number(self.from_all[i, row, col]),
            }
            for row, col in places
        ]


def median(values: Tensor) -> Tensor:
    """Return the median of each row; of an even number of values, the mean of the middle two."""
    ordered = values.sort(dim=1).values  # NaN comes last
    half = values.shape[1] // 2
    middle = (ordered[:, half] + ordered[:, -half - 1]) / 2
    return torch.where(ordered[:, -1].isnan(), ordered[:, -1], middle)


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _in_words(entry: dict[str, Any]) -> str:
    """Return ``entry``, a report on one image, as one line."""
    patches, tokens = math.prod(entry["grid"]), entry["tokens"]
    where = f"after block {entry['layer']}"
    if not tokens:
        return f"no artifact tokens among {patches} patches (norms {where})"
    named = ", ".join(
        f"({token['row']}, {token['col']}) {_short(token['norm'])}" for token in tokens[:NAMED]
    )
    more = f" and {len(tokens) - NAMED} more" if len(tokens) > NAMED else ""
    doubt = "; so many are no artifacts" if entry["suspicious"] else ""
    return (
        f"{len(tokens)} of {patches} patches with a norm above {_short(entry['threshold'])} "
        f"{where}: {named}{more}; they hold {_percent(entry['share'])} of CLS's attention in the "
        f"last block{doubt}"
    )


def _short(number: float | None) -> str:
    return "?" if number is None else f"{number:.4g}"


def _percent(number: float | None) -> str:
    return "?" if number is None else f"{100 * number:.1f} %"
