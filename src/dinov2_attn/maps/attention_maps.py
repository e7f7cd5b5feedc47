"""The weights of one batch of images, and how they lie on the patch grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic

from torch import Tensor

from dinov2_attn.backbone.layout import Layout, check_columns, cut_maps
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps import _facts
from dinov2_attn.maps.facets import FACETS, channels_first, joined_heads, one_facet
from dinov2_attn.maps.gradients import Gradients
from dinov2_attn.maps.places import (
    Head,
    place_of_head,
    place_of_layer,
    place_of_query,
    place_of_sample,
)
from dinov2_attn.maps.result import Array, Result, W, as_array, changed
from dinov2_attn.maps.statistics import Statistics, values_in
from dinov2_attn.math.token_names import Token, position_of
from dinov2_attn.typing import Facet, Grid, Layer, Source, Statistic


@dataclass(frozen=True, eq=False, repr=False)
class AttentionMaps(Result, Generic[W]):
    """The attention weights of one batch of images, and the layout of their rows and columns.

    ``AttentionMaps[W]`` says to a type checker what an entry of ``weights`` is;
    ``AttentionMaps`` alone says that it is a tensor.

    Attributes:
        weights: One entry for each layer: ``(B, heads, Q, N)``, ``(B, Q, N)`` for the mean of
            heads, or what ``reduce`` returned.
        layers: The blocks, counted from 0, or the paths of attention modules.
        grid: Height and width ``(h, w)`` of the patch grid; ``None`` if it is not known, as
            for tokens that did not come from images.
        prefix: The number of columns before the patches: 1 + R for CLS and R registers.
        queries: The positions of the tokens whose rows these are, CLS being 0; ``None`` for
            all tokens.
        suffix: The number of columns behind the patches, such as test-time registers.
        per_cell: The number of tokens of each cell of the grid.
        planes: Where a cell has several tokens: whether one grid follows the other.
        sources: Where the weights of each layer come from: ``"kernel"`` if they follow from what
            its kernel was given, ``"projection"`` if they were computed from its projection alone,
            which is proved. Empty if that is not known.
        facets: What the kernels were given, by the names ``"query"``, ``"key"`` and ``"value"``:
            ``(B, heads, N, d)`` of each layer for all tokens. See ``record``.

    """

    _LAYOUT: ClassVar[tuple[str, ...]] = (
        "layers",
        "grid",
        "prefix",
        "queries",
        "suffix",
        "per_cell",
        "planes",
        "sources",
        "_seen",
    )

    weights: tuple[W, ...]
    layers: tuple[Layer, ...]
    grid: Grid | None
    prefix: int
    queries: tuple[int, ...] | None = None
    suffix: int = 0
    per_cell: int = 1
    planes: bool = False
    sources: tuple[Source, ...] = ()
    facets: Mapping[Facet, tuple[Any, ...]] = field(default_factory=dict)
    _later: Gradients | None = None
    _measured: Mapping[Statistic, tuple[Any, ...]] = field(default_factory=dict)
    _seen: Grid | None = None  # the grid that the model saw, if that is another

    @property
    def statistics(self) -> Statistics[Any]:
        """The statistics of all rows of the weights, which ``record`` was asked for.

        Raises:
            InvalidInputError: ``record`` was not asked for them.

        """
        if not self._measured:
            raise InvalidInputError(
                "a recording of statistics",
                "one without",
                'Ask for them before the pass: record(model, statistics=("entropy", "distance")).',
            )
        place = (self.suffix, self.per_cell, self.planes, self._seen)
        return Statistics(self._measured, self.layers, self.grid, self.prefix, *place)

    @property
    def gradients(self) -> tuple[W, ...]:
        """The gradients by the weights, which the last backward pass made; with their shapes.

        They are outside of autograd's graph.

        Raises:
            InvalidInputError: ``record`` was not asked for them.
            NotRecordedError: There was no backward pass, or it missed a layer.

        """
        if self._later is None:
            raise InvalidInputError(
                "a recording of gradients by the weights",
                "one without",
                "Ask for them before the pass: with record(model, gradients=True) as maps.",
            )
        return self._later.read()

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layers as numbers. Paths of attention modules count from 0 in their order."""
        given = [layer for layer in self.layers if isinstance(layer, int)]
        return tuple(given if len(given) == len(self.layers) else range(len(self.layers)))

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.weights)

    def __iter__(self) -> Iterator[W]:
        """Go over the weights, layer by layer."""
        return iter(self.weights)

    def __getitem__(self, layer: Layer) -> W:
        """Return the weights of ``layer``: ``maps[11]``, ``maps[-1]``.

        A layer goes by what ``layers`` calls it. A negative number counts from the end, and where
        layers are paths a number is a place.

        Raises:
            OutOfRangeError: There is no such layer.

        """
        return self.weights[place_of_layer(self.layers, layer)]

    def at(
        self,
        layer: Layer | None = None,
        head: Head = "mean",
        query: Token = "cls",
        *,
        sample: int = 0,
    ) -> W:
        """Return the map of one token: its attention to the patches, ``(h, w)``.

        >>> maps.at(layer=11, head=3, query=(3, 17))

        Args:
            layer: As in ``maps[layer]``. ``None`` is the last.
            head: The number of a head, or ``"mean"``.
            query: ``"cls"``, ``"register:2"``, a patch ``(row, column)``, or a position.
            sample: Which image of the batch.

        Returns:
            A view of the weights of a head; of several heads their mean.

        Raises:
            OutOfRangeError: There is no such layer, head, query or image.
            InvalidInputError: The grid is unknown, or ``reduce`` has made something else of the
                weights.

        """
        weights: Any = self.weights[place_of_layer(self.layers, layer)]
        self._check_rows(weights)
        layout = self._layout_for(weights)
        length = weights.shape[-1]
        position = position_of(query, self.prefix, layout.grid)
        queries = tuple(range(length)) if self.queries is None else self.queries
        row = place_of_query(queries, position, self.prefix, layout.grid)
        rows = weights[place_of_sample(sample, len(weights))][..., row, :]
        if rows.ndim == 1:
            place_of_head(("mean",), head)
            return cut_maps(rows, layout)  # type: ignore[no-any-return]  # as the weights
        place = place_of_head(range(len(rows)), head)
        return cut_maps(rows.mean(0) if place is None else rows[place], layout)  # type: ignore[no-any-return]

    def patch_maps(self) -> tuple[W, ...]:
        """Return the attention to patches, ``(…, h, w)`` for each layer.

        The equivalent code is ``weights[..., prefix : N - suffix].unflatten(-1, grid)``. Nothing
        is rescaled: a map and its ``prefix_mass()`` together sum to one. Where a cell has k tokens
        the shape is ``(…, k, h, w)``.

        Raises:
            InvalidInputError: The grid is unknown, or the columns are not prefix and grid.

        """
        return tuple(map(self._map, self.weights))

    def prefix_mass(self) -> tuple[W, ...]:
        """Return the attention to CLS and the registers together, ``(…)`` for each layer.

        The attention to each of them is ``weights[..., :prefix]``. Tokens behind the patches count
        too.

        Raises:
            InvalidInputError: The grid is unknown, or the columns are not prefix and grid.

        """
        return tuple(map(self._prefix_mass, self.weights))

    def facet(self, name: Facet, *, joined: bool = False) -> tuple[Any, ...]:
        """Return queries, keys or values, ``(B, heads, N, d)`` for each layer.

        Args:
            name: ``"query"``, ``"key"`` or ``"value"``.
            joined: Whether to join the heads, ``(B, N, heads · d)``: the channels of the module.

        Raises:
            InvalidInputError: The facet was not recorded.

        """
        found = one_facet(self.facets, name)
        return tuple(map(joined_heads, found)) if joined else found

    def facet_maps(self, name: Facet, *, joined: bool = True) -> tuple[Any, ...]:
        """Return queries, keys or values of the patches on their grid.

        Args:
            name: ``"query"``, ``"key"`` or ``"value"``.
            joined: Whether to join the heads.

        Returns:
            ``(B, heads · d, h, w)`` for each layer, or ``(B, heads, d, h, w)`` by heads.

        Raises:
            InvalidInputError: The facet was not recorded, or the grid is unknown.

        """
        found = (channels_first(one, joined=joined) for one in one_facet(self.facets, name))
        return tuple(map(self._map, found))

    def numpy(self: AttentionMaps[Tensor]) -> AttentionMaps[Array]:
        """Return the same with NumPy arrays; bfloat16, which NumPy lacks, becomes float32."""
        maps: AttentionMaps[Array] = self._with(as_array)
        return maps

    def _check_rows(self, weights: Any) -> None:
        if getattr(weights, "ndim", 0) not in (3, 4):
            raise InvalidInputError(
                "weights of shape (B, heads, Q, N) or (B, Q, N)",
                str(tuple(getattr(weights, "shape", ())) or type(weights).__name__),
                "Take what reduce returned as it is: maps[layer].",
            )

    def _map(self, weights: Any) -> Any:
        return cut_maps(weights, self._layout_for(weights))

    def _prefix_mass(self, weights: Any) -> Any:
        layout = self._layout_for(weights)
        check_columns(weights, layout)
        mass = weights[..., : layout.prefix].sum(-1)
        return mass + weights[..., layout.patches.stop :].sum(-1) if layout.suffix else mass

    def _layout_for(self, weights: Any) -> Layout:
        if self.grid is None:
            raise InvalidInputError(
                "maps whose patch grid is known",
                f"weights {tuple(getattr(weights, 'shape', ()))} of tokens that came from no "
                "images of whole patches",
                "Say dataclasses.replace(maps, grid=(h, w)) if you know it; of a recording "
                "say it of maps.passes[0].",
            )
        return Layout(self.prefix, self.suffix, self.grid, self.per_cell, self.planes)

    def _facts(self) -> dict[str, str]:
        return {
            "layers": _facts.layers(self.layers),
            "weights": _facts.shapes(self.weights),
            "grid": _facts.size(self.grid),
            "prefix": f"{self.prefix}",
            **({"suffix": f"{self.suffix}"} if self.suffix else {}),
            "queries": _facts.tokens(self.queries, self.prefix, self.grid),
            **({"sources": ", ".join(dict.fromkeys(self.sources))} if self.sources else {}),
            **({"facets": ", ".join(self.facets)} if self.facets else {}),
            **({"statistics": ", ".join(self._measured)} if self._measured else {}),
        }

    def _with(self, change: Callable[[Tensor], Any]) -> Any:
        _later = None if self._later is None else self._later.changed(lambda v: changed(v, change))
        return replace(super()._with(change), _later=_later)

    def _tensors(self) -> dict[str, Any]:
        kinds: dict[str, tuple[Any, ...]] = {"layer": self.weights}
        kinds.update(self.facets.items())
        kinds.update(self._measured.items())
        if self._later is not None and self._later.are_there:
            kinds["gradient"] = self.gradients
        return {
            f"{kind}.{layer}": one
            for kind, values in kinds.items()
            for layer, one in zip(self.layers, values, strict=True)
        }

    @classmethod
    def _restored(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Any:
        layers = about["layers"]

        def of(kind: str) -> tuple[Any, ...]:
            return tuple(tensors[f"{kind}.{layer}"] for layer in layers)

        held = {name.partition(".")[0] for name in tensors}
        facets = {name: of(name) for name in FACETS if name in held}
        _later = Gradients.of(layers, of("gradient")) if "gradient" in held else None
        measured = values_in(tensors, layers)
        return cls(of("layer"), **about, facets=facets, _later=_later, _measured=measured)


def placed(maps: AttentionMaps[W], layout: Layout | None) -> AttentionMaps[W]:
    """Return ``maps`` with what ``layout`` says of the columns; unchanged without one."""
    if layout is None:
        return maps
    return replace(
        maps,
        grid=layout.grid,
        prefix=layout.prefix,
        suffix=layout.suffix,
        per_cell=layout.per_cell,
        planes=layout.planes,
    )
