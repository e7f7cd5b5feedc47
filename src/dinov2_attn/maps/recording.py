"""The recorded passes of a model: a sequence of ``AttentionMaps``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, overload

import torch
from torch import Tensor

from dinov2_attn.errors import NotRecordedError
from dinov2_attn.grafting.tokens import Tokens
from dinov2_attn.maps.attention_maps import AttentionMaps, placed
from dinov2_attn.maps.places import Head
from dinov2_attn.maps.result import Array, Face, W
from dinov2_attn.maps.statistics import Statistics
from dinov2_attn.math.token_names import Token
from dinov2_attn.typing import Facet, Grid, Layer, Source


class Recording(Face, Sequence[AttentionMaps[W]]):
    """What ``record`` yields: a sequence of ``AttentionMaps``, one for each batch of a pass.

    A pass over a list of batches is recorded as one pass for each batch, in their order.

    If there is exactly one entry, the recording answers for it: ``maps.weights`` is
    ``maps[0].weights``, and so on.

    """

    def __init__(self) -> None:
        self._passes: list[AttentionMaps[W]] = []
        self._unplaced: list[tuple[AttentionMaps[W], Tokens]] = []

    @property
    def passes(self) -> list[AttentionMaps[W]]:
        """The entries as a plain list. In a long loop, take what you need and clear it."""
        for maps, tokens in self._unplaced:
            self._passes[self._passes.index(maps)] = placed(maps, tokens.layout())
        self._unplaced = []
        return self._passes

    @passes.setter
    def passes(self, passes: list[AttentionMaps[W]]) -> None:
        self._passes, self._unplaced = passes, []

    def add(self, maps: AttentionMaps[W], tokens: Tokens | None) -> None:
        """Append ``maps``. If ``tokens`` have to be probed, that is done when they are read."""
        if tokens is not None and not tokens.is_known:
            self._unplaced.append((maps, tokens))
        elif tokens is not None:
            maps = placed(maps, tokens.layout())
        self._passes.append(maps)

    def __len__(self) -> int:
        return len(self.passes)

    @overload
    def __getitem__(self, index: SupportsIndex) -> AttentionMaps[W]: ...
    @overload
    def __getitem__(self, index: slice) -> list[AttentionMaps[W]]: ...

    def __getitem__(
        self, index: SupportsIndex | slice
    ) -> AttentionMaps[W] | list[AttentionMaps[W]]:
        return self.passes[index]

    @property
    def weights(self) -> tuple[W, ...]:
        """The ``weights`` of the one pass."""
        return self._one("weights").weights

    @property
    def gradients(self) -> tuple[W, ...]:
        """The ``gradients`` of the one pass."""
        return self._one("gradients").gradients

    @property
    def facets(self) -> Mapping[Facet, tuple[Any, ...]]:
        """The ``facets`` of the one pass."""
        return self._one("facets").facets

    @property
    def statistics(self) -> Statistics[Any]:
        """The ``statistics`` of the one pass."""
        return self._one("statistics").statistics

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The ``layers`` of the one pass."""
        return self._one("layers").layers

    @property
    def numbers(self) -> tuple[int, ...]:
        """The ``numbers`` of the layers of the one pass."""
        return self._one("numbers").numbers

    @property
    def sources(self) -> tuple[Source, ...]:
        """The ``sources`` of the one pass."""
        return self._one("sources").sources

    @property
    def grid(self) -> Grid | None:
        """The ``grid`` of the one pass."""
        return self._one("grid").grid

    @property
    def prefix(self) -> int:
        """The ``prefix`` of the one pass."""
        return self._one("prefix").prefix

    @property
    def suffix(self) -> int:
        """The ``suffix`` of the one pass."""
        return self._one("suffix").suffix

    @property
    def per_cell(self) -> int:
        """The ``per_cell`` of the one pass."""
        return self._one("per_cell").per_cell

    @property
    def planes(self) -> bool:
        """The ``planes`` of the one pass."""
        return self._one("planes").planes

    @property
    def queries(self) -> tuple[int, ...] | None:
        """The ``queries`` of the one pass."""
        return self._one("queries").queries

    def at(
        self,
        layer: Layer | None = None,
        head: Head = "mean",
        query: Token = "cls",
        *,
        sample: int = 0,
    ) -> W:
        """Return the map of one token in the one pass, as ``AttentionMaps.at`` does."""
        return self._one("at").at(layer, head, query, sample=sample)

    def patch_maps(self) -> tuple[W, ...]:
        """Return the ``patch_maps()`` of the one pass."""
        return self._one("patch_maps").patch_maps()

    def prefix_mass(self) -> tuple[W, ...]:
        """Return the ``prefix_mass()`` of the one pass."""
        return self._one("prefix_mass").prefix_mass()

    def facet(self, name: Facet, *, joined: bool = False) -> tuple[Any, ...]:
        """Return the ``facet`` of the one pass."""
        return self._one("facets").facet(name, joined=joined)

    def facet_maps(self, name: Facet, *, joined: bool = True) -> tuple[Any, ...]:
        """Return the ``facet_maps`` of the one pass."""
        return self._one("facets").facet_maps(name, joined=joined)

    def to(self, device: torch.device | str | int) -> AttentionMaps[W]:
        """Return the one pass on ``device``."""
        return self._one("to").to(device)

    def cpu(self) -> AttentionMaps[W]:
        """Return the one pass on the CPU, detached from autograd's graph."""
        return self._one("cpu").cpu()

    def numpy(self: Recording[Tensor]) -> AttentionMaps[Array]:
        """Return the one pass with NumPy arrays; bfloat16 becomes float32."""
        return self._one("numpy").numpy()

    def save(self, path: str | Path) -> None:
        """Write the one pass to one safetensors file, as ``AttentionMaps.save`` does."""
        self._one("save").save(path)

    def _one(self, name: str) -> AttentionMaps[W]:
        if len(self.passes) != 1:
            raise NotRecordedError(
                f"one recorded pass, whose {name} that is",
                f"{len(self.passes)}",
                "Each forward pass is an entry of .passes, and so is each batch of a list.",
            )
        return self.passes[0]

    def _facts(self) -> dict[str, str]:
        each = [one._facts() for one in self.passes]
        return {"passes": f"{len(each)}"} | {
            name: fact if all(other[name] == fact for other in each) else "various"
            for name, fact in (each[0] if each else {}).items()
        }
