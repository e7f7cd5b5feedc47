"""Queries, keys and values, as a module's own projection makes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from dinov2_attn.biases import Group
from dinov2_attn.tiles import TILE_BYTES, may_tile

Piece = tuple[slice, Tensor, Tensor]


def project(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value ``(B, heads, N, head_dim)`` of tokens ``x (B, N, C)``.

    The module's own ``qkv`` is called, so whatever sits there (hooks, adapters, a
    quantised layer) has its say.
    """
    query, key, value = _by_heads(module, module.qkv(x), 3)
    return query, key, value


class Projection:
    """Queries and keys of tokens ``x (B, N, C)``, made as late as is safe.

    A plain linear layer, where nothing is differentiated or traced, gives the same for a
    few samples at a time, and two thirds of it are enough: no memory to speak of. Whatever
    else sits at ``qkv`` is called as upstream calls it: once, with everything. What a pass
    has ``projected`` already, ``(B, N, 3 · C)``, is not projected again.
    """

    def __init__(self, module: Any, x: Tensor, projected: Tensor | None = None) -> None:
        self._module = module
        self._tokens = x
        if projected is None and not (may_tile(x) and _is_plain(module.qkv)):
            projected = module.qkv(x)
        self._whole = None if projected is None else _by_heads(module, projected, 3)[:2]

    def pieces(self, group: Group | None = None) -> Iterator[Piece]:
        """Yield samples and their query and key ``(b, heads, n, head_dim)``.

        With ``group``, those of its blocks of the concatenation ``x (1, ΣN, C)``.
        """
        if self._whole is not None:
            query, key = self._whole
            if group is not None:
                query = _regroup(group, query, group.queries)
                key = _regroup(group, key, group.keys)
            yield slice(0, len(query)), query, key
        elif group is None:
            yield from self._few_at_a_time(self._tokens, self._tokens)
        else:
            queries = group.split(self._tokens, group.queries)
            same = group.queries == group.keys
            keys = queries if same else group.split(self._tokens, group.keys)
            yield from self._few_at_a_time(queries, keys)

    def _few_at_a_time(self, queries: Tensor, keys: Tensor) -> Iterator[Piece]:
        sample = 2 * queries.shape[1] * queries.shape[2] * queries.element_size()
        few = max(1, TILE_BYTES // max(1, sample))
        for start in range(0, max(1, len(queries)), few):
            some = slice(start, min(start + few, len(queries)))
            query, key = _project_two(self._module, queries[some])
            if keys is not queries:
                _, key = _project_two(self._module, keys[some])
            yield some, query, key


def _project_two(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = module.qkv.weight, module.qkv.bias
    two_thirds = len(weight) // 3 * 2
    out = F.linear(x, weight[:two_thirds], None if bias is None else bias[:two_thirds])
    query, key = _by_heads(module, out, 2)
    return query, key


def _by_heads(module: Any, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
    batch, length, channels = projected.shape
    head_dim = channels // (parts * module.num_heads)
    split = projected.reshape(batch, length, parts, module.num_heads, head_dim)
    return tuple(split.permute(2, 0, 3, 1, 4))


def _regroup(group: Group, tensor: Tensor, where: slice) -> Tensor:
    """Return ``tensor (1, heads, ΣN, head_dim)`` of a group as ``(b, heads, n, head_dim)``."""
    return group.split(tensor.transpose(1, 2), where).transpose(1, 2)


def _is_plain(layer: nn.Module) -> bool:
    """Say whether calling ``layer`` is the product with its weight, and nothing more."""
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
    )
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and not any(hooks)
        and type(layer.weight) in (Tensor, nn.Parameter)  # no quantised or sharded tensor
    )
