"""Another pattern in the place of the one that a kernel would use.

What is not edited keeps its kernel. Keys are hidden from some rows by a second, small call of the
kernel for these rows. Rows with other weights are multiplied with the values here. All
other rows are those of the kernel's own call, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_attn._locks import cached_property
from dinov2_attn.errors import NotEditedError
from dinov2_attn.kernels.call import ExplicitCall, FusedCall, KernelCall, Proof, verify
from dinov2_attn.kernels.place import Place, place_of
from dinov2_attn.math.attention import (
    may_tile,
    past,
    shape_of_weights,
    weights_and_output,
    without_autocast,
    without_needless_grad,
)
from dinov2_attn.math.bias import Group, groups, is_block_diagonal
from dinov2_attn.math.buffers import NewResult, new_result
from dinov2_attn.math.patterns import (
    no_key,
    renormalised,
    sees_any,
    with_hidden,
    with_rows,
    without_heads,
)
from dinov2_attn.math.selection import positions
from dinov2_attn.typing import Heads, Queries

# Positions of queries, or None for all of them.
SomeRows = tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Hidden:
    """Keys that some queries do not see.

    Attributes:
        rows: The positions of the queries, or None for all.
        keys: Boolean ``(B, N)``, or ``(1, N)`` for every sample: the hidden keys.

    """

    rows: SomeRows
    keys: Tensor


C = TypeVar("C", FusedCall, ExplicitCall)


class _OfBase(Generic[C]):
    """What an edit leaves as it is in the call ``base``: sizes, dtype, and what was given."""

    base: C

    @property
    def kernel(self) -> str:
        """The name of the function that was called."""
        return self.base.kernel

    @property
    def value(self) -> Tensor:
        """The values, as for the call itself."""
        return self.base.value

    @property
    def rows(self) -> int:
        """The number of queries."""
        return self.base.rows

    @property
    def batch(self) -> int:
        """The number of samples."""
        return self.base.batch

    @property
    def columns(self) -> int:
        """The number of keys."""
        return self.base.columns

    @property
    def heads(self) -> int:
        """The number of heads of the query."""
        return self.base.heads

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.base.device

    @property
    def dropout(self) -> float:
        """The probability with which the kernel drops weights."""
        return self.base.dropout

    def gradients(
        self, gradient: Tensor, queries: Queries = None, heads: Heads = None
    ) -> Tensor | list[Tensor]:
        """Return the gradients by the edited weights, given that by the edited output."""
        return self.base.gradients(gradient, queries, heads)

    def facets(self, names: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return copies of what the kernel was given."""
        return self.base.facets(names)


@dataclass(frozen=True, eq=False)
class EditedCall(_OfBase[FusedCall]):
    """A call of a fused kernel, and what is changed about its weights.

    Attributes:
        base: The call as the module made it, in the dtype of the kernel.
        hidden: Keys that the kernel is to mask.
        zeroed: Heads whose rows are zero, except those in ``put_rows``.
        put: ``(B, heads, R, N)``: weights in the place of the kernel's.
        put_rows: The positions of these R rows.
        mixed: The output, where it was computed with ``put``.
        is_own: Whether ``put`` has all rows of ``explicit``, so that nothing else refers to it.
        output: ``(B, heads, Q, d)``, or None if it was not computed.
        place: Where autograd makes the gradient by ``output``, or None without one.

    """

    base: FusedCall
    hidden: tuple[Hidden, ...] = ()
    zeroed: tuple[int, ...] = ()
    put: Tensor | None = None
    put_rows: tuple[int, ...] = ()
    mixed: Tensor | None = None
    output: Tensor | None = None
    place: Place | None = None
    is_own: bool = False

    @property
    def sums_to_one(self) -> bool:
        """Whether each row does."""
        return not self.is_changed and self.base.sums_to_one

    @property
    def is_changed(self) -> bool:
        """Whether anything is edited."""
        return bool(self.hidden or self.zeroed or self.put_rows)

    @property
    def parts(self) -> Sequence[EditedCall]:
        """The call alone. ``EditedList`` has one for each element."""
        return [self]

    def ran(self, output: Tensor, heads_first: Callable[[Tensor], Tensor]) -> EditedCall:
        """Return the call with the edited output, which ``heads_first`` rearranges."""
        return replace(self, output=heads_first(output), place=place_of(output, heads_first))

    def detached(self) -> EditedCall:
        """Return the call outside of autograd's graph, without output."""
        put = None if self.put is None else self.put.detach()
        return replace(
            self, base=self.base.detached(), put=put, mixed=None, output=None, place=None
        )

    def gradient_tile(self, gradient: Tensor, sample: int, heads: slice, lines: slice) -> Tensor:
        """Return the gradient by a ``tile``, given that by the output."""
        return self.base.gradient_tile(gradient, sample, heads, lines)

    def each(self, change: Callable[[Part], Part]) -> Pattern:
        """Return what ``change`` makes of this call."""
        return change(self)

    def zero(self, heads: Sequence[int]) -> EditedCall:
        """Return the call with all weights of ``heads`` zero."""
        put = None if self.put is None else without_heads(self.put, heads)
        return replace(self, zeroed=tuple({*self.zeroed, *heads}), put=put, mixed=None)

    def hide(self, rows: SomeRows, keys: Tensor) -> EditedCall:
        """Return the call with ``keys (B or 1, N)`` hidden from ``rows``.

        Raises:
            InvalidInputError: If a row is left without any key.

        """
        put = self.put
        places = [i for i, row in enumerate(self.put_rows) if rows is None or row in rows]
        if put is not None and places:
            put = with_rows(put, places, renormalised(put[:, :, places], keys))
        edited = replace(self, hidden=(*self.hidden, Hidden(rows, keys)), put=put, mixed=None)
        edited._check_rows()
        return edited

    def weights_of(self, rows: SomeRows) -> Tensor:
        """Return the weights ``(B, heads, R, N)`` of ``rows``."""
        return self._rows(range(self.rows) if rows is None else rows)

    def with_weights(self, rows: SomeRows, weights: Tensor) -> EditedCall:
        """Return the call with ``weights (B, heads, R, N)`` in the place of those of ``rows``."""
        rows = tuple(range(self.rows)) if rows is None else rows
        kept = [i for i, row in enumerate(self.put_rows) if row not in set(rows)]
        if self.put is not None and kept:
            weights = torch.cat([self.put[:, :, kept], weights], dim=2)
        rows = (*(self.put_rows[i] for i in kept), *rows)
        return replace(self, put=weights, put_rows=rows, mixed=None, is_own=False)

    def explicit(self) -> EditedCall:
        """Return the call with its own weights in the place of the kernel's, for all rows.

        The output is then ``weights @ value``. Without autograd each tile of the weights is
        multiplied while it is in the cache.
        """
        query, (key, value) = self.base.query, self.base._by_query_head
        with without_needless_grad(query, key, value, self.base.bias):
            if not self.is_changed and may_tile(query):
                return self._by_tiles(query, key, value)
        own = self.with_weights(None, self._rows(range(self.rows)))
        return replace(own, is_own=True)

    def _by_tiles(self, query: Tensor, key: Tensor, value: Tensor) -> EditedCall:
        out = new_result(query, shape_of_weights(query, key, None))
        causal = None
        if self.base.is_causal:
            causal = torch.arange(self.rows, device=self.device)
        masks = {"bias": self.base._dense_bias, "causal_rows": causal}
        mixed = weights_and_output(query, key, value, self.base.scale, **masks, out=out)
        rows = tuple(range(self.rows))
        return replace(self, put=out, put_rows=rows, mixed=mixed, is_own=True)

    def call(self) -> EditedCall:
        """Return the call for those who take its weights."""
        return self

    def run(self, original: Callable[[], Tensor]) -> Tensor:
        """Return the output ``(B, heads, Q, d)``.

        Args:
            original: Runs the kernel as the module called it. It is not run without need.

        """
        if self.mixed is not None:
            return self.mixed
        if self.put is not None and self._is_put:
            return self._mixed(self.put)
        parts = self._groups()
        plain = any(not hidden for _, hidden in parts)
        output = original() if plain else None
        for rows, hidden in parts:
            if hidden:
                output = _joined(output, self.rows, rows, self._attend(rows, hidden))
        if output is not None and self.zeroed:
            output = without_heads(output, self.zeroed)
        if self.put is not None:
            output = _joined(output, self.rows, self.put_rows, self._mixed(self.put))
        return original() if output is None else output  # a call may have no rows

    def kept(self) -> EditedCall:
        """Return the call without values and output, which the weights do not need."""
        return replace(self, base=self.base.kept(), mixed=None, output=None, place=None)

    def at(self, rows: list[int]) -> EditedCall:
        """Return the call of some queries only. ``tile`` is told their positions."""
        places = {row: i for i, row in enumerate(self.put_rows)}
        found = [i for i, row in enumerate(rows) if row in places]
        put = None if self.put is None else self.put[:, :, [places[rows[i]] for i in found]]
        return EditedCall(self.masked.at(rows), (), self.zeroed, put, tuple(found))

    def wide(self) -> EditedCall:
        """Return the call in float32 at least."""
        put = None if self.put is None else self.put.to(self._wide)
        return replace(self, base=self.base.wide(), put=put)

    def tile(
        self, sample: int, heads: slice, lines: slice, positions: Tensor, memory: Tensor
    ) -> Tensor:
        """Return some rows of the weights of one sample, ``(heads, lines, N)``, in ``memory``."""
        if self.put is not None and self._is_put:
            return self.put[sample, heads, lines]
        tile = self.masked.tile(sample, heads, lines, positions, memory)
        for i, head in enumerate(range(self.heads)[heads]):
            if head in self.zeroed:
                tile[i] = 0
        places = {row: i for i, row in enumerate(self.put_rows)}
        for i, row in enumerate(range(self.rows)[lines]):
            if self.put is not None and row in places:
                tile[:, i] = self.put[sample, heads, places[row]]
        return tile

    def weights(
        self, queries: Queries = None, heads: Heads = None, new: NewResult = new_result
    ) -> Tensor | list[Tensor]:
        """Return the weights ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean of heads."""
        if self.put is None and not self.zeroed:
            return self.masked.weights(queries, heads, new)
        if self.put is not None and self.is_own and queries is None and heads is None:
            return self.put
        found = self._rows(positions(queries, self.rows))
        return found.to(self._wide).mean(1).to(found.dtype) if heads == "mean" else found

    def check(self, module: str, *, one_head: bool = False) -> None:
        """Raise ``UnfaithfulError`` unless ``weights @ value`` is the output, on a few rows.

        Weights that were put in, and rows of zeros, make the output by definition.
        """
        verify(self.proofs(module, one_head=one_head))

    def proofs(self, module: str, *, one_head: bool = False) -> list[Proof]:
        """Return what ``check`` compares, for ``verify``."""
        if self.put is not None or self.zeroed:
            return []
        return replace(self.masked, output=self.output).proofs(module, one_head=one_head)

    @cached_property
    def masked(self) -> FusedCall:
        """Return the call with the hidden keys in its bias, as one for all rows."""
        if not self.hidden:
            return self.base
        bias = with_hidden(self.base._dense_bias, self._seen(self.hidden))
        return replace(self.base, bias=bias, output=None)

    @property
    def _is_put(self) -> bool:
        """Whether ``put`` has all rows, in their order."""
        return len(self.put_rows) == self.rows and self.put_rows == tuple(range(self.rows))

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _seen(self, hidden: Sequence[Hidden], *, whole: bool = True) -> Tensor:
        """Return where keys are visible, ``(B or 1, 1, Q or 1, N)``. Not ``whole``: one row."""
        samples = max((len(one.keys) for one in hidden), default=1)
        lines = self.rows if whole and any(one.rows is not None for one in hidden) else 1
        shape = (samples, 1, lines, self.columns)
        seen = torch.ones(shape, dtype=torch.bool, device=self.device)
        for one in hidden:
            visible = ~one.keys.to(self.device)[:, None, None]
            if one.rows is None or not whole:
                seen = seen & visible
            else:
                seen[:, :, list(one.rows)] &= visible
        return seen

    def _groups(self) -> list[tuple[SomeRows, tuple[Hidden, ...]]]:
        """Return rows of the kernel together with the keys that are hidden from all of them."""
        if not self.put_rows and all(one.rows is None for one in self.hidden):
            return [(None, self.hidden)]
        taken = set(self.put_rows)
        sets = [range(self.rows) if one.rows is None else set(one.rows) for one in self.hidden]
        found: dict[tuple[int, ...], list[int]] = {}
        for row in range(self.rows):
            if row not in taken:
                found.setdefault(tuple(i for i, own in enumerate(sets) if row in own), []).append(
                    row
                )
        return [(tuple(rows), tuple(self.hidden[i] for i in own)) for own, rows in found.items()]

    def _mask(self, rows: SomeRows, hidden: Sequence[Hidden]) -> Tensor:
        """Return the mask of some rows for the kernel: the module's own and the hidden keys."""
        bias, index = self.base._dense_bias, slice(None) if rows is None else list(rows)
        if bias is not None and bias.ndim > 1 and bias.shape[-2] > 1:
            bias = bias[..., index, :]
        seen = self._seen(hidden, whole=False)
        if self.base.is_causal:
            seen = seen & past(torch.arange(self.rows, device=self.device)[index], self.columns)
        return with_hidden(bias, seen)

    def _check_rows(self) -> None:
        for rows, hidden in self._groups():
            if not hidden:
                continue
            after = sees_any(self._mask(rows, hidden))
            if after.all():
                continue
            if (lost := sees_any(self._mask(rows, ())) & ~after).any():
                first = int(lost.nonzero()[0, -1])  # 0 too where one row of the mask serves all
                every = rows is None and lost.shape[-1] == 1
                position = first if rows is None else rows[first]
                raise no_key(self.columns, "any query" if every else f"query {position}")

    def _attend(self, rows: SomeRows, hidden: Sequence[Hidden]) -> Tensor:
        """Call PyTorch's kernel for some rows, with ``hidden`` keys masked."""
        query, (key, value) = self.base.query, self.base._by_query_head
        query = query if rows is None else query[:, :, list(rows)]
        mask = self._mask(rows, hidden)
        if mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        # PyTorch before 2.1 has no argument for the scale.
        usual = 1 / math.sqrt(query.shape[-1])
        if self.base.scale != usual:
            query = query * (self.base.scale / usual)
        try:
            return F.scaled_dot_product_attention(query, key, value, mask, self.base.dropout)
        except RuntimeError as error:
            if torch.backends.cuda.math_sdp_enabled():  # type: ignore[no-untyped-call]
                raise
            raise NotEditedError(
                "a kernel that takes a mask, which hides keys",
                "that sdpa_kernel(...) allows none",
                "Allow one more: sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]).",
            ) from error

    def _mixed(self, weights: Tensor) -> Tensor:
        with without_autocast(self.device):
            if self.base.dropout:
                weights = F.dropout(weights, self.base.dropout)
            return weights @ self.base._by_query_head[1]

    def _rows(self, rows: Sequence[int]) -> Tensor:
        places = {row: i for i, row in enumerate(self.put_rows)}
        found = [i for i, row in enumerate(rows) if row in places]
        put = None if self.put is None else self.put[:, :, [places[rows[i]] for i in found]]
        if put is not None and len(found) == len(rows):
            return put
        # The parts of a list are calls of their own, so this is no list.
        weights = cast("Tensor", self.masked.weights(list(rows)))
        if self.zeroed:
            weights = without_heads(weights, self.zeroed)
        return weights if put is None or not found else with_rows(weights, found, put)


@dataclass(frozen=True, eq=False)
class EditedProduct(_OfBase[ExplicitCall]):
    """A softmax of explicit code that is changed before it is multiplied with the values.

    Attributes:
        base: The call as the module makes it.
        factor: What is multiplied, ``(B, heads, Q, N)``: the matrix after dropout.

    """

    base: ExplicitCall
    factor: Tensor
    is_changed: bool = False

    def each(self, change: Callable[[Part], Part]) -> Pattern:
        """Return what ``change`` makes of this call."""
        return change(self)

    def zero(self, heads: Sequence[int]) -> EditedProduct:
        """Return the call with all weights of ``heads`` zero."""
        base = replace(self.base, matrix=without_heads(self.base.matrix, heads))
        return EditedProduct(base, without_heads(self.factor, heads), is_changed=True)

    def hide(self, rows: SomeRows, keys: Tensor) -> EditedProduct:
        """Return the call with ``keys (B or 1, N)`` hidden from ``rows``.

        The weights of the other keys grow by one factor for each row, as under a mask before the
        softmax.

        Raises:
            InvalidInputError: If a row is left without any weight.

        """
        if keys.all(-1).any():
            raise no_key(self.columns, "any query" if rows is None else f"query {rows[0]}")
        return self.with_weights(rows, renormalised(self.weights_of(rows), keys))

    def weights_of(self, rows: SomeRows) -> Tensor:
        """Return the weights ``(B, heads, R, N)`` of ``rows``."""
        return self.base.matrix if rows is None else self.base.matrix[:, :, list(rows)]

    def with_weights(self, rows: SomeRows, weights: Tensor) -> EditedProduct:
        """Return the call with ``weights (B, heads, R, N)`` in the place of those of ``rows``."""
        dropped = weights
        if self.base.dropout:
            dropped = F.dropout(weights, self.base.dropout)
        if rows is not None:
            weights = with_rows(self.base.matrix, rows, weights)
            dropped = with_rows(self.factor, rows, dropped)
        return EditedProduct(replace(self.base, matrix=weights), dropped, is_changed=True)

    def call(self) -> ExplicitCall:
        """Return the call for those who take its weights."""
        if not self.is_changed:
            return self.base
        # Behind dropout the gradient is no longer that by the matrix.
        place = None if self.base.dropout else place_of(self.factor, lambda gradient: gradient)
        return replace(self.base, place=place)

    def run(self, original: Callable[[], Tensor]) -> Tensor:
        """Return the factor ``(B, heads, Q, N)`` that the module is to multiply."""
        del original
        return self.factor


@dataclass(frozen=True, eq=False)
class EditedList(_OfBase[FusedCall]):
    """A call on a nested list: each of its elements is edited by itself.

    Attributes:
        base: The call as the module made it.
        found: The elements, as consecutive blocks of the tokens.
        parts: Their calls.
        output: ``(1, heads, ΣN, d)``, or None if it was not computed.
        place: Where autograd makes the gradient by ``output``, or None without one.

    """

    base: FusedCall
    found: list[Group]
    parts: list[EditedCall]
    output: Tensor | None = None
    place: Place | None = None

    @property
    def is_changed(self) -> bool:
        """Whether anything is edited."""
        return any(part.is_changed for part in self.parts)

    def ran(self, output: Tensor, heads_first: Callable[[Tensor], Tensor]) -> EditedList:
        """Return the call with the edited output, which ``heads_first`` rearranges."""
        return replace(self, output=heads_first(output), place=place_of(output, heads_first))

    def detached(self) -> EditedList:
        """Return the call outside of autograd's graph, without output."""
        parts = [part.detached() for part in self.parts]
        return replace(self, base=self.base.detached(), parts=parts, output=None, place=None)

    def each(self, change: Callable[[Part], Part]) -> Pattern:
        """Return the call with each of its parts changed."""
        parts: Any = [change(part) for part in self.parts]
        return replace(self, parts=parts)

    def call(self) -> EditedList:
        """Return the call for those who take its weights."""
        return self

    def run(self, original: Callable[[], Tensor]) -> Tensor:
        """Return the output ``(1, heads, ΣN, d)``."""

        def of(group: Group) -> Tensor:
            return group.split(original().transpose(1, 2), group.queries).transpose(1, 2)

        outputs = [
            part.run(partial(of, group)) for group, part in zip(self.found, self.parts, strict=True)
        ]
        return torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outputs])[None].transpose(
            1, 2
        )

    def weights(
        self, queries: Queries = None, heads: Heads = None, new: NewResult = new_result
    ) -> list[Tensor]:
        """Return the weights of each element."""
        found: list[Any] = [part.weights(queries, heads, new) for part in self.parts]
        return found

    def check(self, module: str, *, one_head: bool = False) -> None:
        """Do nothing: the call was proved before it was edited."""

    def proofs(self, module: str, *, one_head: bool = False) -> list[Proof]:
        """Return an empty list, because there is nothing left to prove."""
        del module, one_head
        return []


Part = EditedCall | EditedProduct
Pattern = EditedCall | EditedProduct | EditedList


def editable(call: KernelCall, factor: Tensor | None = None) -> Pattern:
    """Return ``call`` as a pattern that can be changed.

    Args:
        call: What a kernel is given.
        factor: What explicit code multiplies, ``(B, heads, Q, N)``.

    """
    if isinstance(call, ExplicitCall):
        return EditedProduct(call, call.matrix if factor is None else factor)
    call = call._same_dtype()
    if not is_block_diagonal(call.bias):
        return EditedCall(call)
    wide = torch.promote_types(call.dtype, torch.float32)
    found = groups(call.bias, call.query.transpose(1, 2), wide)
    return EditedList(call, found, [EditedCall(part) for part in call._groups()])


def _joined(output: Tensor | None, length: int, rows: SomeRows, part: Tensor) -> Tensor:
    """Return ``output (B, heads, length, d)`` with ``part`` as some of its rows."""
    if rows is None or (output is None and rows == tuple(range(length))):
        return part
    if output is None:
        output = part.new_zeros((*part.shape[:2], length, part.shape[3]))
    return with_rows(output, rows, part)
