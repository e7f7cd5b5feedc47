"""Queries and keys of a layer, and the smallest factors that give the same products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_attn.backbone.backbone import Backbone
from dinov2_attn.grafting.channel import Receiver, prove_once
from dinov2_attn.grafting.modules import queries_and_keys_from
from dinov2_attn.kernels.call import FusedCall, KernelCall
from dinov2_attn.math.attention import attention_weights


@dataclass(frozen=True, eq=False)
class QueriesKeys:
    """What the weights of one layer on one image are made of.

    Attributes:
        layer: The number of the block.
        query: ``(heads, N, d)``.
        key: ``(heads, N, d)``.
        scale: The factor on their products.

    """

    layer: int
    query: Tensor
    key: Tensor
    scale: float

    @property
    def heads(self) -> int:
        """The number of heads."""
        return len(self.query)

    @property
    def tokens(self) -> int:
        """The number of tokens N."""
        return self.query.shape[1]

    def weights(self, head: int, rows: slice) -> Tensor:
        """Return the model's own weights of some rows of a head, ``(Q, N)``."""
        query, key = self.query[head, rows], self.key[head]
        return attention_weights(query[None, None], key[None, None], self.scale)[0, 0]


@dataclass(frozen=True, eq=False)
class Factors:
    """Factors of the products of one head, with ``left · right / size`` in place of ``q kᵀ``.

    The components are those of a singular value decomposition of the products, the largest
    first. The softmax cancels what all keys of a head have in common, so it is left out.

    Attributes:
        left: float64 ``(N, r)``, for queries.
        right: float64 ``(N, r)``, for keys.
        size: float64 ``(r,)``, the singular values.

    """

    left: Tensor
    right: Tensor
    size: Tensor

    @property
    def spread(self) -> float:
        """The standard deviation of the products."""
        return float(self.size.norm() / len(self.left))


def projected(backbone: Backbone, images: Tensor, layers: Sequence[int]) -> Iterator[QueriesKeys]:
    """Yield the queries and keys of ``layers`` of a grafted model, from their projections.

    Raises:
        InvalidInputError: if a mask or bias decides about the weights too.

    """
    for layer, block, tokens in backbone.walk(backbone.tokens(images), max(layers) + 1):
        if layer in layers:
            ((piece, scale),) = queries_and_keys_from(block, tokens, None)
            query, key = piece.query[0].cpu(), piece.key[0].cpu()
            yield QueriesKeys(layer, query, key.expand(len(query), -1, -1), scale)


@dataclass(eq=False)
class Products(Receiver):
    """Keeps the queries and keys of layers whose weights follow from their products alone.

    Layers with a bias or a mask at their kernel, and explicit softmax code, are left out.

    Attributes:
        numbers: The attention modules and the numbers of their layers.
        found: What the kernels were given, in the order of the pass.

    """

    numbers: Mapping[nn.Module, int]
    found: list[QueriesKeys] = field(default_factory=list)

    @property
    def stops(self) -> bool:
        """False: the pass runs to its end."""
        return False

    def wants(self, attention: nn.Module) -> bool:
        """Return whether ``attention`` is that of a layer of the page."""
        return attention in self.numbers

    def take(self, attention: nn.Module, call: KernelCall) -> None:
        """Keep the queries and keys of the only image."""
        number = self.numbers[attention]
        prove_once(attention, call, f"layer {number}")
        call = call.kept()
        if isinstance(call, FusedCall) and call.bias is None and not call.is_causal:
            query, key = call.query[0].cpu(), call.key[0].cpu()
            key = key.repeat_interleave(len(query) // len(key), 0)
            self.found.append(QueriesKeys(number, query, key, call.scale))


def factors(query: Tensor, key: Tensor, scale: float) -> Factors:
    """Return the factors of the products of one head.

    Args:
        query: ``(N, d)``.
        key: ``(N, d)``.
        scale: The factor on the products.

    """
    query, key = query.double() * scale, key.double()
    to_query, sizes_of_query, query_basis = _svd(query)
    to_key, sizes_of_key, key_basis = _svd(key - key.mean(0))
    core = (sizes_of_query[:, None] * query_basis) @ (key_basis.T * sizes_of_key)
    left, size, right = _svd(core)
    return Factors(to_query @ left * size, to_key @ right.T * size, size)


def _svd(matrix: Tensor) -> Any:
    return torch.linalg.svd(matrix, full_matrices=False)
