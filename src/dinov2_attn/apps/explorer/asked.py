"""What a model is asked for a page: which layers, of what shape, and in which ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dinov2_attn.apps.explorer.budget import Shape
from dinov2_attn.apps.explorer.factors import Products, QueriesKeys, projected
from dinov2_attn.apps.explorer.write import checked_grid
from dinov2_attn.backbone.backbone import Backbone, transformers_in
from dinov2_attn.errors import IncompatibleUpstreamError, InvalidInputError
from dinov2_attn.grafting.api import install
from dinov2_attn.grafting.channel import recording, unrecorded
from dinov2_attn.grafting.models import is_grafted
from dinov2_attn.maps.layers import recorded_in
from dinov2_attn.maps.one_batch import attention_maps, run_model, walks_as_counted
from dinov2_attn.maps.record import record
from dinov2_attn.typing import Heads, Layer, RecordedLayers


@dataclass(frozen=True, eq=False)
class Asked:
    """Some layers of any model, and the image that they are asked about.

    Attributes:
        model: The model.
        images: The only image, ``(1, C, H, W)``, on the model's device.
        heads: ``None`` for each head, ``"mean"`` for their mean.
        names: What each layer is called in the model, by its number on the page.
        shape: The shape of their weights.

    """

    model: nn.Module
    images: Tensor
    heads: Heads
    names: Mapping[int, Layer]
    shape: Shape

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers."""
        return list(self.names)

    def queries_and_keys(self) -> list[QueriesKeys]:
        """Return what the weights of each layer are made of, where nothing else decides them."""
        if walks_as_counted(self.model, [self.images]):
            return list(projected(Backbone(self.model), self.images, self.layers))
        wanted = recorded_in(self.model, list(self.names.values())).wanted
        numbers = {name: number for number, name in self.names.items()}
        products = Products({module: numbers[name] for module, name in wanted.items()})
        with unrecorded(), recording(products, products.numbers):
            run_model(self.model, self.images)
        return products.found

    def weights(
        self, rows: Mapping[tuple[int, ...], list[int]], take: Callable[[int, Tensor], None]
    ) -> None:
        """Give ``take`` the weights ``(heads, Q, N)`` or ``(Q, N)`` of layers, one by one.

        ``rows`` holds the layers by the tokens whose rows are wanted.
        """
        numbers = {name: number for number, name in self.names.items()}

        def reduce(layer: Layer, weights: Tensor) -> None:
            take(numbers[layer], weights[0])

        with ExitStack() as recordings:
            for queries, layers in rows.items():
                names: Any = [self.names[layer] for layer in layers]
                one = record(self.model, names, queries=queries, heads=self.heads, reduce=reduce)
                recordings.enter_context(one)
            run_model(self.model, self.images)


@contextmanager
def grafted_inside(model: nn.Module) -> Iterator[None]:
    """Graft a bare DINOv2 inside: explicit code has no queries and keys at a kernel.

    Any other model stays as it is.
    """
    with ExitStack() as grafts:
        if transformers_in(model)[:1] == [model] and not is_grafted(model):
            with suppress(IncompatibleUpstreamError):
                grafts.enter_context(install(model))
        yield


def asked_of(model: nn.Module, images: Tensor, layers: RecordedLayers, heads: Heads) -> Asked:
    """Return what ``model`` is asked, having run it once.

    Raises:
        InvalidInputError: If its tokens are not CLS, registers and one for each patch.

    """
    maps = attention_maps(model, images, layers, queries=[0])
    grid = checked_grid(maps)
    tokens = maps.weights[0].shape[-1]
    heads_found = {weights.shape[1] for weights in maps.weights}
    if len(heads_found) != 1:
        raise InvalidInputError(
            "layers with the same number of heads",
            ", ".join(map(str, sorted(heads_found))),
            "Name some of them: layers=[...].",
        )
    each = 0 if heads else heads_found.pop()
    shape = Shape(each, tuple(range(tokens)), maps.prefix, grid)
    return Asked(model, images, heads, _numbered(model, maps.layers), shape)


def _numbered(model: nn.Module, layers: tuple[Layer, ...]) -> dict[int, Layer]:
    """Return ``layers`` by their numbers: paths count from 0 in the order of the model."""
    if all(isinstance(layer, int) for layer in layers):
        return {int(layer): layer for layer in layers}
    known = list(dict.fromkeys(recorded_in(model, list(layers)).all.values()))
    return {known.index(layer): layer for layer in layers}
