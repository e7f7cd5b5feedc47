"""Where the patches are among the tokens of one sequence, and how a map is cut out of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.typing import Grid


@dataclass(frozen=True)
class Layout:
    """Which of the N tokens of a sequence are patches, and where these are in the image.

    Attributes:
        prefix: The number of tokens before the patches: CLS, registers, storage tokens.
        suffix: The number of tokens behind the patches, such as test-time registers.
        grid: Height and width ``(h, w)`` of the patch grid. Cells are in order row by row.
        per_cell: The number of tokens k of each cell of the grid.
        planes: Says where the k tokens of a cell are: next to each other (``False``), or
            h·w tokens apart, so that one grid follows the other (``True``).

    """

    prefix: int
    suffix: int
    grid: Grid
    per_cell: int = 1
    planes: bool = False

    @property
    def cells(self) -> int:
        """The number of cells h·w of the grid."""
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        """The number of tokens N of a sequence."""
        return self.patches.stop + self.suffix

    @property
    def patches(self) -> range:
        """The positions of all patch tokens, which stand together in every layout."""
        return range(self.prefix, self.prefix + self.cells * self.per_cell)

    def cell(self, position: int) -> Grid | None:
        """Return row and column of the token at ``position``, or None if it is no patch."""
        if position not in self.patches:
            return None
        i = position - self.prefix
        number = i % self.cells if self.planes else i // self.per_cell
        return divmod(number, self.grid[1])


def cut_maps(weights: Any, layout: Layout) -> Any:
    """Return the columns of the patches on their grid.

    For one token a cell the equivalent code is
    ``weights[..., prefix : N - suffix].unflatten(-1, grid)``.

    Args:
        weights: A tensor or an array ``(…, N)``, of any dtype.
        layout: The layout of its columns.

    Returns:
        ``(…, h, w)``, or ``(…, k, h, w)`` where a cell has k > 1 tokens, in the order of the
        sequence. It is a view where ``reshape`` returns one.

    Raises:
        InvalidInputError: The last dimension of ``weights`` is not ``layout.length``.

    """
    check_columns(weights, layout)
    patches = weights[..., layout.patches.start : layout.patches.stop]
    lead, k = patches.shape[:-1], layout.per_cell
    if k == 1:
        return patches.reshape(*lead, *layout.grid)
    if layout.planes:
        return patches.reshape(*lead, k, *layout.grid)
    return patches.reshape(*lead, *layout.grid, k).swapaxes(-1, -2).swapaxes(-2, -3)


def check_columns(weights: Any, layout: Layout) -> None:
    """Raise ``InvalidInputError`` unless ``weights`` has a column for each token."""
    shape = tuple(getattr(weights, "shape", ()))
    if shape and shape[-1] == layout.length:
        return
    height, width = layout.grid
    behind = f" + {layout.suffix}" if layout.suffix else ""
    each = f" · {layout.per_cell}" if layout.per_cell > 1 else ""
    raise InvalidInputError(
        f"{layout.prefix} + {height} · {width}{each}{behind} = {layout.length} columns: CLS and "
        "registers, then the patches" + (", then other tokens" if behind else ""),
        f"weights of shape {shape}" if shape else f"{type(weights).__name__}",
        "Correct prefix, suffix or grid, or keep the columns in reduce.",
    )
