"""Statistics of the attention of one batch of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from dinov2_attn.backbone.layout import Layout, cut_maps
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.grafting.tokens import named
from dinov2_attn.maps import _facts
from dinov2_attn.maps.measuring import STATISTICS
from dinov2_attn.maps.result import Array, Result, W, as_array
from dinov2_attn.math.selection import to_index
from dinov2_attn.typing import Grid, Layer, Queries, Statistic


@dataclass(frozen=True, eq=False, repr=False)
class Statistics(Result, Generic[W]):
    """Statistics of the attention weights of one batch of images, in float32 at least.

    >>> found = statistics(model, images, ("entropy", "distance"))
    >>> found["entropy"][-1]                # of the last layer, (B, heads, Q)
    >>> found.patch_maps("distance")[-1]    # of its patches, (B, heads, h, w)
    >>> found.by_head("distance")           # means over patches, (layers, B, heads)

    Attributes:
        values: Each statistic by its name, with one entry for each layer. ``"entropy"``,
            ``"distance"``, ``"prefix_mass"`` and ``"spread"`` are ``(B, heads, Q)`` for all
            queries. ``"received"`` is ``(B, heads, N)`` for all keys, and ``"centroid"``
            ``(B, heads, Q, 2)``: row and column. For the mean of heads they have no dimension of
            heads.
        layers: The blocks, counted from 0, or the paths of attention modules.
        grid: Height and width ``(h, w)`` of the patch grid, or None if it is not known.
        prefix: The number of tokens before the patches.
        suffix: The number of tokens behind the patches.
        per_cell: The number of tokens of each cell of the grid.
        planes: Where a cell has several tokens: whether one grid follows the other.
        seen: The patch grid that the model saw, where ``extract(grid=...)`` stored another.
            Positions, distances and spreads are in patches of this one.

    """

    _LAYOUT: ClassVar[tuple[str, ...]] = (
        "layers",
        "grid",
        "prefix",
        "suffix",
        "per_cell",
        "planes",
        "seen",
    )

    values: Mapping[Statistic, tuple[W, ...]]
    layers: tuple[Layer, ...]
    grid: Grid | None
    prefix: int
    suffix: int = 0
    per_cell: int = 1
    planes: bool = False
    seen: Grid | None = None

    def __len__(self) -> int:
        """Return the number of statistics."""
        return len(self.values)

    def __iter__(self) -> Iterator[Statistic]:
        """Go over the names of the statistics."""
        return iter(self.values)

    def __contains__(self, name: object) -> bool:
        """Return whether the statistic ``name`` is there."""
        return isinstance(name, str) and name in self.values

    def __getitem__(self, name: Statistic) -> tuple[W, ...]:
        """Return one statistic, an entry for each layer.

        Raises:
            InvalidInputError: If it was not measured.

        """
        if name in self:
            return self.values[name]
        raise InvalidInputError(
            f"the statistic {name!r}",
            f"statistics of {', '.join(map(repr, self.values)) or 'none'}",
            "Measure it too: name it in of=, or in statistics= of record and extract.",
        )

    def patch_maps(self, name: Statistic) -> tuple[W, ...]:
        """Return one statistic of the patches on their grid, an entry for each layer.

        Returns:
            ``(B, heads, h, w)``, of ``"centroid"`` ``(B, heads, h, w, 2)``. Where a cell has k
            tokens there is a dimension k before ``h``.

        Raises:
            InvalidInputError: If it was not measured, or the grid is unknown.

        """
        found: Any = self[name]
        layout = self._layout()
        if name != "centroid":
            return tuple(cut_maps(one, layout) for one in found)
        both = ((cut_maps(one[..., i], layout) for i in (0, 1)) for one in found)
        return tuple(_stacked(*one) for one in both)

    def by_head(self, name: Statistic, queries: Queries = "patches") -> W:
        """Return the mean of one statistic over queries, ``(layers, B, heads)``.

        Papers draw this: of each head of each layer how far it attends. A query without a number
        (NaN) does not count. ``"received"`` has the keys in place of the queries.

        Args:
            name: The statistic, not ``"centroid"``.
            queries: The tokens: ``"patches"``, ``"cls"``, ``"registers"``, ``None`` for all,
                positions or a slice.

        Raises:
            InvalidInputError: If it was not measured or is ``"centroid"``, or if layers differ in
                heads or windows. For a name of tokens also if the grid is unknown, or if queries
                are other tokens than keys.
            OutOfRangeError: If there is no such token.

        """
        found: Any = self[name]
        if name == "centroid":
            raise InvalidInputError(
                "a statistic with one number for each query",
                "'centroid', with a row and a column",
                'Take its entries: statistics["centroid"].',
            )
        tensors = [torch.as_tensor(one) for one in found]
        if isinstance(queries, str):
            layout = self._layout()
            _check_tokens(queries, tensors, layout.length)
            queries = named(queries, layout)
        _check_shapes(name, tensors)
        chosen = [one[..., to_index(queries, one.shape[-1])] for one in tensors]
        means: Any = torch.stack([one.nanmean(-1) for one in chosen])
        means = means if isinstance(found[0], Tensor) else as_array(means)
        mean: W = means
        return mean

    def numpy(self: Statistics[Tensor]) -> Statistics[Array]:
        """Return the same with NumPy arrays."""
        arrays: Statistics[Array] = self._with(as_array)
        return arrays

    def _layout(self) -> Layout:
        if self.grid is None:
            raise InvalidInputError(
                "statistics whose patch grid is known",
                "statistics of tokens that came from no images of whole patches",
                "Say dataclasses.replace(statistics, grid=(h, w), prefix=p) if you know it, or "
                "pass queries=None for all tokens.",
            )
        return Layout(self.prefix, self.suffix, self.grid, self.per_cell, self.planes)

    def _facts(self) -> dict[str, str]:
        return {
            "statistics": ", ".join(self.values) or "none",
            "layers": _facts.layers(self.layers),
            "values": _facts.shapes([one for each in self.values.values() for one in each]),
            "grid": _facts.size(self.grid),
            **({"seen": _facts.size(self.seen)} if self.seen else {}),
            "prefix": f"{self.prefix}",
            **({"suffix": f"{self.suffix}"} if self.suffix else {}),
        }

    def _tensors(self) -> dict[str, Any]:
        return {
            f"{name}.{layer}": one
            for name, values in self.values.items()
            for layer, one in zip(self.layers, values, strict=True)
        }

    @classmethod
    def _restored(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Any:
        values: Any = values_in(tensors, about["layers"])
        return cls(values=values, **about)


def values_in(
    tensors: Mapping[str, Tensor], layers: Sequence[Layer]
) -> dict[Statistic, tuple[Tensor, ...]]:
    """Return the statistics among the ``tensors`` of a file."""
    held = {name.partition(".")[0] for name in tensors}
    return {
        name: tuple(tensors[f"{name}.{layer}"] for layer in layers)
        for name in STATISTICS
        if name in held
    }


def _check_tokens(queries: str, tensors: Sequence[Tensor], length: int) -> None:
    for one in tensors:
        if one.shape[-1] != length:
            raise InvalidInputError(
                f"{queries!r} among the tokens of the keys, of which there are {length}",
                f"{one.shape[-1]} queries, which are other tokens",
                "Pass queries=None for all of these, or positions.",
            )


def _check_shapes(name: Statistic, tensors: Sequence[Tensor]) -> None:
    shapes = list(dict.fromkeys(tuple(one.shape[:-1]) for one in tensors))
    if len(shapes) > 1:
        raise InvalidInputError(
            "layers with as many heads and windows, for one tensor of their means",
            f"layers of {' and '.join(map(str, shapes[:2]))}",
            f"Take the mean of each layer: [one.nanmean(-1) for one in statistics[{name!r}]]. Or "
            "measure those of one stage: layers=[...].",
        )


def _stacked(row: Any, column: Any) -> Any:
    if isinstance(row, Tensor):
        return torch.stack([row, column], -1)
    return as_array(torch.stack([torch.as_tensor(row), torch.as_tensor(column)], -1))
