"""Reading attention biases of any class.

xFormers' masks have moved between packages, and users write their own. So a bias is recognised by
what it has: it is a tensor, it has ``materialize``, or it has blocks (``q_seqinfo.seqstart_py``,
``_batch_sizes``). Biases are never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dinov2_attn._compat import is_compiling
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.math.selection import Rows

_Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Group:
    """Consecutive blocks of equal size: one element of the list that was nested.

    ``queries`` and ``keys`` are their tokens in the concatenation, ``batch`` blocks in a
    row, and ``mask``, ``(n, m)`` or ``None``, is added to the scores inside each::

        tokens  a a a b b          batch = 2, queries = slice(0, 6)
                b b ...            a block of 3 tokens, and another
    """

    batch: int
    queries: slice
    keys: slice
    mask: Tensor | None

    @property
    def length(self) -> int:
        """The queries of one block."""
        return int(self.queries.stop - self.queries.start) // self.batch

    def split(self, tokens: Tensor, where: slice) -> Tensor:
        """Return tokens ``(1, ΣN, …)`` of this group as ``(batch, n, …)``."""
        length = int(where.stop - where.start) // self.batch
        return tokens[0, where].reshape(self.batch, length, *tokens.shape[2:])


def is_known(bias: object) -> bool:
    """Return whether ``bias`` is of a kind that can be read here: a tensor or ``materialize``."""
    return isinstance(bias, Tensor) or callable(getattr(bias, "materialize", None))


def is_block_diagonal(bias: object) -> bool:
    """Return whether ``bias`` names blocks of queries, each of which sees its own keys only."""
    if isinstance(bias, Tensor) or not hasattr(bias, "q_seqinfo") or not is_known(bias):
        return False
    # Padded and gappy keys leave holes between blocks, pages shuffle them.
    infos = (_queries(bias), _keys(bias))
    return not hasattr(bias, "block_tables") and all(map(_is_gapless, infos))


def groups(bias: Any, tokens: Tensor, dtype: torch.dtype) -> list[Group]:
    """Return the blocks of a block-diagonal ``bias`` over ``tokens (1, ΣN, …)``.

    They are grouped by ``_batch_sizes`` if a list was nested, otherwise each block is a group.

    Raises:
        InvalidInputError: If bias and tokens do not fit.

    """
    _check_length(bias, tokens)
    blocks = list(
        zip(pairwise(_queries(bias).seqstart_py), pairwise(_keys(bias).seqstart_py), strict=True)
    )
    found: list[Group] = []
    done = 0
    for size in _sizes(bias, len(blocks)):
        alike = blocks[done : done + size]
        _check_lengths(alike, len(found))
        (first, first_key), (last, last_key) = alike[0], alike[-1]
        inside = _inside(bias, first, first_key, tokens, dtype)
        span, span_key = slice(first[0], last[1]), slice(first_key[0], last_key[1])
        found.append(Group(size, span, span_key, inside))
        done += size
    return found


def dense(bias: Any, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return ``bias`` as a tensor that broadcasts to scores of ``shape (B, heads, N, N)``."""
    made = bias if isinstance(bias, Tensor) else _materialized(bias, shape, device, dtype)
    fits = made.ndim <= len(shape) and all(
        own in (1, needed) for own, needed in zip(made.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise InvalidInputError(
            f"an attn_bias that broadcasts to (B, heads, N, N) = {shape}",
            f"one of shape {tuple(made.shape)}",
            "Check heads and tokens; the tokens count CLS and registers too.",
        )
    # PyTorch's kernel reads a mask of another dtype as if it had the dtype of the query.
    return made if made.dtype == torch.bool else made.to(dtype)


def bias_of_rows(bias: Tensor, rows: Rows) -> Tensor:
    """Return the part of a dense ``bias`` for some rows of the scores. It may have one for all."""
    return bias if bias.ndim < 2 or bias.shape[-2] == 1 else bias[..., rows, :]


def unknown(bias: object) -> InvalidInputError:
    """Return the error that names a kind of bias that cannot be read."""
    kind = type(bias)
    return InvalidInputError(
        "attn_bias to be None, a dense tensor or an object with a method materialize",
        f"one of type {kind.__module__}.{kind.__qualname__}",
        "Pass the dense tensor of what is added to the scores.",
    )


def _queries(bias: Any) -> Any:
    return bias.q_seqinfo


def _keys(bias: Any) -> Any:
    return getattr(bias, "k_seqinfo", bias.q_seqinfo)


def _is_gapless(info: Any) -> bool:
    starts = getattr(info, "seqstart_py", None)
    if starts is None:
        return False
    intervals = getattr(info, "intervals", None)
    return intervals is None or list(intervals()) == list(pairwise(starts))


def _sizes(bias: Any, blocks: int) -> list[int]:
    """Return how many blocks belong to each group."""
    sizes = getattr(bias, "_batch_sizes", None)
    if sizes is None:
        return [1] * blocks
    if sum(sizes) != blocks or any(size < 1 for size in sizes):
        raise InvalidInputError(
            f"_batch_sizes of at least 1 that add up to the {blocks} blocks of attn_bias",
            f"{list(sizes)}",
            "Leave _batch_sizes at None for one result for each block.",
        )
    return list(sizes)


def _check_lengths(blocks: Sequence[tuple[_Span, _Span]], group: int) -> None:
    lengths = [queries[1] - queries[0] for queries, _ in blocks]
    of_keys = [span[1] - span[0] for _, span in blocks]
    if len({*zip(lengths, of_keys, strict=True)}) > 1:
        raise InvalidInputError(
            f"blocks of one length in group {group} of attn_bias._batch_sizes",
            f"lengths {lengths}" + ("" if of_keys == lengths else f", of keys {of_keys}"),
            "Leave _batch_sizes at None for one result for each block.",
        )


def _check_length(bias: Any, tokens: Tensor) -> None:
    queries, keys = _queries(bias).seqstart_py, _keys(bias).seqstart_py
    if len(queries) != len(keys):
        raise InvalidInputError(
            "as many blocks of keys as of queries in attn_bias",
            f"{len(keys) - 1} and {len(queries) - 1}",
            "Name the keys that each block of queries sees.",
        )
    ends = (queries[-1], keys[-1])
    if tokens.shape[0] != 1 or ends != (tokens.shape[1],) * 2:
        raise InvalidInputError(
            f"tokens of shape (1, {ends[0]}, C), as many as the blocks of attn_bias hold"
            + ("" if ends[0] == ends[1] else f", which hold {ends[1]} keys"),
            f"{tuple(tokens.shape)}",
            "Concatenate the sequences along dimension 1, in the order of the blocks.",
        )


def _inside(
    bias: Any, queries: _Span, keys: _Span, tokens: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Return what is added inside a block, such as a causal mask, ``None`` if nothing is."""
    shape = (queries[1] - queries[0], keys[1] - keys[0])
    if hasattr(bias, "_create_block_mask"):
        mask = bias._create_block_mask(shape, dtype=dtype, device=tokens.device)
    else:  # correct for any class of blocks, at the price of the dense matrix
        whole = _materialized(bias, (tokens.shape[1],) * 2, tokens.device, dtype)
        mask = whole[..., slice(*queries), slice(*keys)]
    # A compiled graph cannot read a value, so it adds the zeros.
    return mask if is_compiling() or bool(mask.any()) else None


def _materialized(
    bias: Any, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    try:
        made: Tensor = bias.materialize(shape, dtype=dtype, device=device)
    except NotImplementedError:  # the base class of xFormers' biases
        raise unknown(bias) from None
    return made
