"""Everything on a page except its weights: the image, the model, the sentences."""

from __future__ import annotations

import io
from base64 import b64encode
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2_attn.apps.explorer.budget import MEGABYTE, Shape
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.relevance import Relevance
from dinov2_attn.math.selection import name_token


class Outliers(Protocol):
    """The part of ``ArtifactTokens`` that a page needs: patches with outlier norms.

    ``mask`` is boolean ``(B, h, w)``; ``threshold`` and ``layer`` are ``(B,)``.
    """

    @property
    def mask(self) -> Any: ...
    @property
    def threshold(self) -> Any: ...
    @property
    def layer(self) -> Any: ...


@dataclass(frozen=True)
class Explained:
    """The relevance of every token for a target.

    Attributes:
        target: What is explained, in words.
        method: The method.
        row: Whose row it is, in words.
        values: The relevance of each token.

    """

    target: str
    method: str
    row: str
    values: tuple[float, ...]

    def data(self) -> dict[str, object]:
        """Return what the page is given. Six digits are more than colours show."""
        layers = "last layer" if self.method == "attention_gradient" else "all layers"
        values = [float(f"{value:.6g}") for value in self.values]
        about = {"target": self.target, "method": self.method, "row": self.row, "layers": layers}
        return {**about, "values": values}


def explained(found: Relevance[Any], shape: Shape, sample: int = 0) -> Explained:
    """Return the first row of the relevance of one image.

    Raises:
        InvalidInputError: If its tokens are not those of the page.

    """
    if found.grid != shape.grid or found.prefix != shape.prefix or found.suffix:
        raise InvalidInputError(
            f"a relevance of {shape.prefix} tokens and a grid {shape.grid}",
            f"one of {found.prefix} and {found.grid}",
            "Pass what relevance returned for the same image.",
        )
    words = found.target
    target = words[sample if len(words) > 1 else 0] if words else "a target"
    row = "mean of the rows of all tokens"
    if found.queries:
        row = f"row of {name_token(found.queries[0], found.prefix, found.grid)}"
    values = tuple(float(value) for value in found.weights[sample][0])
    return Explained(target, found.method, row, values)


@dataclass(frozen=True, eq=False)
class Frame:
    """What a page shows besides weights.

    Attributes:
        picture: uint8 ``(H, W, 3)``: the image, cropped to whole patches.
        shape: Heads, rows and columns of the weights.
        title: The title of the page: any text, often the name of a file.
        model: What the caption calls the model.
        warning: A line that stands out above everything else, or ``None``.
        outliers: Patches to mark. ``None`` if they were not searched for.
        sample: Which image of ``outliers`` this is.
        limit: The maximum size of the page in bytes.
        range_note: A sentence about the range of the image.
        explained: The relevance for a target, if there is one.

    """

    picture: npt.NDArray[np.uint8]
    shape: Shape
    title: str
    model: str
    warning: str | None
    outliers: Outliers | None
    sample: int
    limit: int
    range_note: str = ""
    explained: Explained | None = None

    def __post_init__(self) -> None:
        height, width = self.shape.grid
        wanted = self.picture.ndim == 3 and self.picture.dtype == np.uint8
        wanted = wanted and self.picture.shape[2] == 3
        if not wanted or self.picture.shape[0] % height or self.picture.shape[1] % width:
            raise InvalidInputError(
                f"a picture, uint8 (H, W, 3), cropped to whole patches of a grid {self.shape.grid}",
                f"{self.picture.dtype} {self.picture.shape}",
                "Pass the .picture of the LoadedImage from which these maps were computed.",
            )

    @property
    def outlier_tokens(self) -> list[int]:
        """The positions of outliers among the tokens."""
        if self.outliers is None:
            return []
        mask = np.asarray(self.outliers.mask[self.sample].cpu()).ravel()
        return [self.shape.prefix + int(patch) for patch in np.flatnonzero(mask)]

    @property
    def outliers_found(self) -> str:
        """A note about outliers, for a label."""
        if self.outliers is None:
            return "(not searched for)"
        threshold = float(self.outliers.threshold[self.sample])
        layer = int(self.outliers.layer[self.sample])
        count = len(self.outlier_tokens)
        return f"({count}: norm above {threshold:.4g} after layer {layer})"

    @property
    def token_counts(self) -> str:
        """The tokens in words: CLS, 4 registers, 37 × 49 patches."""
        height, width = self.shape.grid
        registers = self.shape.prefix - 1
        cls = "CLS, " if self.shape.prefix else ""
        named = f"{registers} register{'s' * (registers > 1)}, " if registers > 0 else ""
        return f"{self.shape.tokens} tokens: {cls}{named}{height} × {width} patches"

    def image_url(self) -> str:
        """Return the picture as a data URL."""
        file = io.BytesIO()
        # JPEG is enough: nothing is computed from it.
        Image.fromarray(self.picture).save(file, "JPEG", quality=90)
        return f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"


def bytes_in(megabytes: float) -> int:
    """Return a number of bytes. Raise ``InvalidInputError`` unless it is above 0 and finite."""
    if not 0 < megabytes < float("inf"):
        raise InvalidInputError("max_mb above 0", repr(megabytes), "25 is the default.")
    return int(megabytes * MEGABYTE)
