"""All of a page but its weights: the photograph, who made the maps, and what is to be said."""

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


class Outliers(Protocol):
    """What a page takes of ``ArtifactTokens``: patches of odd norm in a batch of images.

    ``mask`` is boolean ``(B, h, w)``, ``threshold`` ``(B,)``, and ``layer`` ``(B,)`` where it was
    seen.
    """

    @property
    def mask(self) -> Any: ...
    @property
    def threshold(self) -> Any: ...
    @property
    def layer(self) -> Any: ...


@dataclass(frozen=True, eq=False)
class Frame:
    """What a page shows besides weights.

    ========  ==================================================================
    picture   uint8 ``(H, W, 3)``: the photograph, cropped to whole patches
    shape     heads, rows and columns of the weights
    title     the page's title, a file's name as a rule; any text
    model     what the caption calls the model
    warning   a line that stands out above everything; none if ``None``
    outliers  patches to mark, of which ``sample`` counts; ``None``: not looked for
    limit     the greatest size of the page in bytes
    read      a sentence on how the image was read
    ========  ==================================================================
    """

    picture: npt.NDArray[np.uint8]
    shape: Shape
    title: str
    model: str
    warning: str | None
    outliers: Outliers | None
    sample: int
    limit: int
    read: str = ""

    def __post_init__(self) -> None:
        height, width = self.shape.grid
        wanted = self.picture.ndim == 3 and self.picture.dtype == np.uint8
        wanted = wanted and self.picture.shape[2] == 3
        if not wanted or self.picture.shape[0] % height or self.picture.shape[1] % width:
            raise InvalidInputError(
                f"a picture, uint8 (H, W, 3), cropped to whole patches of a grid {self.shape.grid}",
                f"{self.picture.dtype} {self.picture.shape}",
                "Pass LoadedImage.picture, from which the images of these maps were made.",
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
        """What there is to say of them."""
        if self.outliers is None:
            return "(not looked for)"
        threshold = float(self.outliers.threshold[self.sample])
        layer = int(self.outliers.layer[self.sample])
        count = len(self.outlier_tokens)
        return f"({count}: norm above {threshold:.4g} after layer {layer})"

    @property
    def tokens_told(self) -> str:
        """What the tokens are: CLS, 4 registers, 37 × 49 patches."""
        height, width = self.shape.grid
        registers = self.shape.prefix - 1
        named = f"{registers} register{'s' * (registers > 1)}, " if registers else ""
        return f"{self.shape.tokens} tokens: CLS, {named}{height} × {width} patches"

    def image_url(self) -> str:
        """Return the picture as an address that holds it."""
        file = io.BytesIO()
        # A backdrop: nothing is computed from it.
        Image.fromarray(self.picture).save(file, "JPEG", quality=90)
        return f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"


def bytes_in(megabytes: float) -> int:
    """Return a number of bytes. Raises ``InvalidInputError`` unless it is above 0 and finite."""
    if not 0 < megabytes < float("inf"):
        raise InvalidInputError("max_mb above 0", repr(megabytes), "25 is the default.")
    return int(megabytes * MEGABYTE)
