"""What is exported: a model, the attention that is asked of it, and what PyTorch answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dinov2_attn
from dinov2_attn._locks import cached_property
from dinov2_attn.apps.export.asked import Asked
from dinov2_attn.apps.export.check import TOLERANCES
from dinov2_attn.apps.export.graph import WithAttentions, tensors_of
from dinov2_attn.apps.viz.tokens import check_queries, resolve
from dinov2_attn.backbone.backbone import check_in_eval_mode, checked_module
from dinov2_attn.backbone.structure import name_of
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.geometry import Geometry, geometry_of, size_of_images
from dinov2_attn.maps.layers import recorded_in
from dinov2_attn.maps.one_batch import attention_maps
from dinov2_attn.math.selection import Rows, whole_number
from dinov2_attn.typing import Grid, Heads, Layer, Queries

SEED = 0


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, and the attention that is asked of it for images of one size.

    Attributes:
        model: The model.
        geometry: Its patches, channels and tokens.
        asked: The layers and tokens.
        heads: None for each head, ``"mean"`` for their mean.
        size: Height and width of images, in pixels.

    """

    model: nn.Module
    geometry: Geometry
    asked: Asked
    heads: Heads
    size: Grid

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model, and so of its images."""
        return next(self.model.parameters()).dtype

    @property
    def bytes(self) -> int:
        """The bytes of all weights."""
        tensors = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @property
    def described(self) -> str:
        """The images in words, for an error."""
        return f"for images of {self.size[0]} × {self.size[1]}"

    def images(self, count: int) -> Tensor:
        """Return a batch ``(count, C, H, W)`` of normal noise, the same at every call."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (count, self.geometry.channels, *self.size)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return what PyTorch answers: the model's own output, then the attention."""
        own = {name: tensor.detach().cpu() for name, tensor in tensors_of(self.model(images))}
        maps = self._maps(images)
        names = [self._name(layer, own) for layer in maps.layers]
        weights = dict(zip(names, maps.weights, strict=True))
        return {**own, **{name: tensor.detach().cpu() for name, tensor in weights.items()}}

    @cached_property
    def maps(self) -> AttentionMaps:
        """Return the attention of one image: layers, rows and grid are those of every image."""
        return self._maps(self.images(1))

    @cached_property
    def _first(self) -> dict[str, Tensor]:
        return self.outputs(self.images(1))

    @property
    def names(self) -> list[str]:
        """The names of all outputs."""
        return list(self._first)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each output for one image, without the batch."""
        return {name: tuple(tensor.shape[1:]) for name, tensor in self._first.items()}

    @property
    def layers(self) -> dict[str, Layer]:
        """What the model calls the layer of each output of attention."""
        own = len(self.names) - len(self.maps.layers)
        return dict(zip(self.names[own:], self.maps.layers, strict=True))

    def wrapped(self) -> WithAttentions:
        """Return the model with its attention as further outputs."""
        called = recorded_in(self.model, self.asked.layers).wanted
        modules = {layer: module for module, layer in called.items()}
        rows: Rows = slice(None) if self.maps.queries is None else _as_rows(self.maps.queries)
        return WithAttentions(
            self.model, [modules[layer] for layer in self.maps.layers], rows, self.heads
        )

    def facts(self, name: str | None) -> dict[str, Any]:
        """Return what the metadata of the file say, as values of JSON."""
        maps = self.maps
        return {
            "version": dinov2_attn.__version__,
            "model": name or name_of(type(self.model)),
            "image_size": list(self.size),
            "patch_size": list(self.geometry.patch_size),
            "grid": list(maps.grid or ()),
            "prefix": maps.prefix,
            "suffix": maps.suffix,
            "layers": self.layers,
            "heads": "mean" if self.heads == "mean" else "each",
            "queries": self.asked.query,
            "positions": None if maps.queries is None else list(maps.queries),
        }

    def _maps(self, images: Tensor) -> AttentionMaps:
        queries = self._queries(images)
        return attention_maps(
            self.model, images, self.asked.layers, queries=queries, heads=self.heads
        )

    def _queries(self, images: Tensor) -> Queries:
        grid = self.geometry.grid(*images.shape[-2:])
        return resolve([self.asked.query], self.geometry.prefix, grid)

    def _name(self, layer: Layer, own: Mapping[str, Tensor]) -> str:
        number = layer if isinstance(layer, int) else self._paths.index(layer)
        name = f"attention_{number}"
        return f"{name}_weights" if name in own else name  # the model may call one of its own so

    @cached_property
    def _paths(self) -> list[Layer]:
        return list(dict.fromkeys(recorded_in(self.model, None).all.values()))


def subject_of(model: Any, asked: Asked, heads: Heads, image_size: Any) -> Subject:
    """Return what is exported; raise ``InvalidInputError`` if it cannot be."""
    check_in_eval_mode(checked_module(model))
    dtype = next((parameter.dtype for parameter in model.parameters()), None)
    if dtype not in TOLERANCES:
        raise InvalidInputError(
            "a model in float32 or float16, which onnxruntime runs",
            f"one of {dtype}",
            "Convert it: model.float().",
        )
    geometry = geometry_of(model)
    check_queries([asked.query], geometry.registers)
    return Subject(model, geometry, asked, heads, _size(model, geometry, image_size))


def _size(model: nn.Module, geometry: Geometry, given: Any) -> Grid:
    """Return height and width of images in whole patches: as given, or the model's own."""
    if given is None:
        return size_of_images(model, geometry.patch_size)
    sides = tuple(given) if isinstance(given, tuple | list) else (given, given)
    lengths = tuple(whole_number(side, "the sides of image_size") for side in sides)
    steps = geometry.patch_size
    if len(lengths) != 2 or any(n < 1 or n % step for n, step in zip(lengths, steps, strict=True)):
        near = tuple(
            step * max(1, round(n / step)) for n, step in zip(lengths, steps, strict=False)
        )
        raise InvalidInputError(
            f"image_size in whole patches of {steps[0]} × {steps[1]} pixels, one or two numbers",
            " × ".join(map(str, lengths)),
            f"Try {' '.join(map(str, near))}.",
        )
    return lengths[0], lengths[1]


def _as_rows(positions: tuple[int, ...]) -> Rows:
    """Return positions as a slice where they are a range: a graph is smaller with it."""
    first, last = positions[0], positions[-1]
    if positions == tuple(range(first, last + 1)):
        return slice(first, last + 1)
    return list(positions)
