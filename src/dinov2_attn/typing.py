"""Types for code that uses this package: the arguments and results of grafted models.

>>> from dinov2_attn.typing import GraftedVisionTransformer
>>> model: GraftedVisionTransformer = dinov2_attn.grafted(model)

Grafts are set on classes at run time, which no type checker sees. The protocols here declare
the grafted methods, and ``dinov2_attn.grafted`` returns a model as one of them.

This module does not import torch: aliases that name its tensors are strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    SupportsIndex,
    TypeAlias,
    TypedDict,
    overload,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from typing_extensions import Self

__all__ = [
    "Facet",
    "Features",
    "Forward",
    "GraftedAttention",
    "GraftedBlock",
    "GraftedVisionTransformer",
    "Grid",
    "Heads",
    "Images",
    "Layers",
    "Masks",
    "Model",
    "Queries",
    "QueryWord",
    "Source",
    "Statistic",
]

QueryWord = Literal["cls", "registers", "patches"]
# A tensor or an array of positions has __index__ for a type checker, and tolist() at run time.
Queries = QueryWord | SupportsIndex | slice | Sequence[SupportsIndex] | None
Heads = Literal["mean"] | None
Layers = SupportsIndex | Sequence[SupportsIndex] | None
# What a layer is called: the number of its block, or the path of its attention module.
Layer = int | str
RecordedLayers = Layers | str | Sequence[str] | Sequence[int | str]
# Heads to ablate, and keys to hide: names, positions, or a boolean mask.
EditedHeads: TypeAlias = "SupportsIndex | Sequence[SupportsIndex]"
HiddenKeys: TypeAlias = "Queries | Tensor"
Grid = tuple[int, int]
# Where weights come from: the call of a kernel, or the proved projection of a class.
Source = Literal["kernel", "projection"]
# What a kernel is given.
Facet = Literal["query", "key", "value"]
# What is measured of weights, without keeping them.
Statistic = Literal["entropy", "distance", "received", "prefix_mass", "spread", "centroid"]

Images: TypeAlias = "Tensor | Sequence[Tensor]"
Masks: TypeAlias = "Tensor | Sequence[Tensor | None] | None"
# A grafted model, typed as such or as a plain module.
Model: TypeAlias = "nn.Module | GraftedVisionTransformer"

# Any method of upstream's, with any arguments and result.
Forward = Callable[..., Any]


class _EveryFeature(TypedDict):
    x_norm_clstoken: Tensor
    x_norm_patchtokens: Tensor
    x_prenorm: Tensor
    masks: Tensor | None
    attentions: tuple[Tensor, ...]


class Features(_EveryFeature, total=False):
    """The result of ``forward_features(x, return_attention=True)``: upstream's dict, and a key.

    ``x_norm_regtokens`` exists in versions of upstream with registers; DINOv3 calls them
    ``x_storage_tokens``.
    """

    x_norm_regtokens: Tensor
    x_storage_tokens: Tensor


class GraftedAttention(Protocol):
    """An attention module whose forward ``install`` has grafted."""

    @overload
    def __call__(
        self,
        x: Tensor,
        attn_bias: None = None,
        *,
        return_attn: Literal[True],
        queries: Queries = None,
        heads: Heads = None,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        x: Tensor,
        attn_bias: Any,
        *,
        return_attn: Literal[True],
        queries: Queries = None,
        heads: Heads = None,
    ) -> Tensor | list[Tensor]: ...
    @overload
    def __call__(self, x: Tensor, attn_bias: Any = None) -> Tensor: ...


class GraftedBlock(Protocol):
    """A transformer block whose forward ``install`` has grafted."""

    @overload
    def __call__(
        self,
        x: Tensor,
        *,
        return_attention: Literal[True],
        queries: Queries = None,
        heads: Heads = None,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        x: Sequence[Tensor],
        *,
        return_attention: Literal[True],
        queries: Queries = None,
        heads: Heads = None,
    ) -> list[Tensor]: ...
    @overload
    def __call__(self, x: Tensor) -> Tensor: ...
    @overload
    def __call__(self, x: Sequence[Tensor]) -> list[Tensor]: ...


class GraftedVisionTransformer(Protocol):
    """A vision transformer that ``install`` has grafted.

    A tensor of images gives tensors, a list of them gives lists. The protocol also names the
    methods of ``torch.nn.Module`` that return the model. For functions of torch that take the
    model (an optimiser, ``torch.compile``), keep the variable that was an ``nn.Module``.
    """

    @property
    def blocks(self) -> nn.ModuleList: ...
    @property
    def training(self) -> bool: ...

    def eval(self) -> Self: ...
    def train(self, mode: bool = True) -> Self: ...
    def to(self, *args: Any, **kwargs: Any) -> Self: ...
    def requires_grad_(self, requires_grad: bool = True) -> Self: ...
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> Mapping[str, Tensor]: ...

    @overload
    def get_self_attention(
        self,
        x: Tensor,
        n: Layers = None,
        masks: Tensor | None = None,
        *,
        queries: Queries = None,
        heads: Heads = None,
    ) -> tuple[Tensor, ...]: ...
    @overload
    def get_self_attention(
        self,
        x: Sequence[Tensor],
        n: Layers = None,
        masks: Sequence[Tensor | None] | None = None,
        *,
        queries: Queries = None,
        heads: Heads = None,
    ) -> tuple[list[Tensor], ...]: ...

    @overload
    def get_last_self_attention(
        self,
        x: Tensor,
        masks: Tensor | None = None,
        *,
        queries: Queries = None,
        heads: Heads = None,
    ) -> Tensor: ...
    @overload
    def get_last_self_attention(
        self,
        x: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        *,
        queries: Queries = None,
        heads: Heads = None,
    ) -> list[Tensor]: ...

    @overload
    def get_last_selfattention(
        self,
        x: Tensor,
        masks: Tensor | None = None,
        *,
        queries: Queries = None,
        heads: Heads = None,
    ) -> Tensor: ...
    @overload
    def get_last_selfattention(
        self,
        x: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        *,
        queries: Queries = None,
        heads: Heads = None,
    ) -> list[Tensor]: ...

    @overload
    def forward_features(
        self,
        x: Tensor,
        masks: Tensor | None = None,
        *,
        return_attention: Literal[True],
        queries: Queries = None,
        heads: Heads = None,
    ) -> Features: ...
    @overload
    def forward_features(
        self,
        x: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        *,
        return_attention: Literal[True],
        queries: Queries = None,
        heads: Heads = None,
    ) -> list[Features]: ...
    @overload
    def forward_features(
        self, x: Tensor, masks: Tensor | None = None, *, return_attention: Literal[False] = False
    ) -> dict[str, Any]: ...
    @overload
    def forward_features(
        self, x: Sequence[Tensor], masks: Masks = None, *, return_attention: Literal[False] = False
    ) -> list[dict[str, Any]]: ...

    # What upstream's own forward returns depends on its head and on is_training.
    @overload
    def __call__(
        self,
        x: Tensor,
        masks: Tensor | None = None,
        *,
        return_attention: Literal[True],
        queries: Queries = None,
        heads: Heads = None,
        **kwargs: Any,
    ) -> tuple[Any, tuple[Tensor, ...]]: ...
    @overload
    def __call__(
        self,
        x: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        *,
        return_attention: Literal[True],
        queries: Queries = None,
        heads: Heads = None,
        **kwargs: Any,
    ) -> tuple[list[Any], tuple[list[Tensor], ...]]: ...
    @overload
    def __call__(
        self,
        x: Images,
        masks: Masks = None,
        *,
        return_attention: Literal[False] = False,
        **kwargs: Any,
    ) -> Any: ...
