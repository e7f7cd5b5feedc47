"""One call of a kernel: what an attention module handed to it, and the weights that follow.

A fused kernel is given queries and keys, and never makes the weights. ``FusedCall`` computes them
from the same arguments. Explicit code has them already: ``ExplicitCall`` holds that tensor.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_attn._locks import cached_property
from dinov2_attn.errors import InvalidInputError, UnfaithfulError
from dinov2_attn.kernels.place import Place, place_of
from dinov2_attn.math.attention import (
    attention_weights,
    may_autocast,
    may_tile,
    shape_of_weights,
    without_needless_grad,
)
from dinov2_attn.math.bias import (
    Group,
    bias_of_rows,
    dense,
    groups,
    is_block_diagonal,
    is_known,
    unknown,
)
from dinov2_attn.math.buffers import NewResult, new_result
from dinov2_attn.math.gradients import weight_gradients
from dinov2_attn.math.selection import Rows, to_index
from dinov2_attn.typing import Heads, Queries

# Rows of each sequence that a proof computes: few beside the hundreds of a pass.
PROVED_ROWS = 4

# A kernel may be off by so many roundings of a sum of this size.
_ROUNDINGS = 16


@dataclass(frozen=True, eq=False)
class FusedCall:
    """A call of PyTorch's ``scaled_dot_product_attention``, or of xFormers' kernel.

    Attributes:
        kernel: The name of the function that was called.
        query: ``(B, heads, Q, d)``, as the kernel reads it.
        key: ``(B, heads, N, d)``, or with fewer heads, each for several heads of the query.
        value: ``(B, heads, N, d)``, with the heads of the key.
        scale: The factor on ``query @ keyᵀ``.
        bias: None, a tensor that broadcasts to ``(B, heads, Q, N)``, or a bias of xFormers'.
        is_causal: Whether query ``i`` sees the keys ``0 … i`` only.
        dropout: The probability with which the kernel drops weights.
        output: ``(B, heads, Q, d)``, or None if the kernel did not run.
        place: Where autograd makes the gradient by ``output``, or None without one.

    """

    kernel: str
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bias: Any = None
    is_causal: bool = False
    dropout: float = 0.0
    output: Tensor | None = None
    place: Place | None = None

    @property
    def rows(self) -> int:
        """The number of queries."""
        return self.query.shape[2]

    @property
    def batch(self) -> int:
        """The number of samples."""
        return self.query.shape[0]

    @property
    def columns(self) -> int:
        """The number of keys."""
        return self.key.shape[2]

    @property
    def heads(self) -> int:
        """The number of heads of the query."""
        return self.query.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.query.device

    @property
    def sums_to_one(self) -> bool:
        """Whether each row does: one that a bias masks completely is zero."""
        return self.bias is None

    @property
    def parts(self) -> Sequence[FusedCall]:
        """The call of each element of a nested list, or this one, in the kernel's dtype."""
        return self._same_dtype()._parts()

    def kept(self) -> FusedCall:
        """Return the call without values and output, which the weights do not need."""
        call = self._same_dtype()
        return replace(call, value=call.key, output=None, place=None)

    def ran(self, output: Tensor, heads_first: Callable[[Tensor], Tensor]) -> FusedCall:
        """Return the call with what the kernel returned, which ``heads_first`` rearranges."""
        place = place_of(output, heads_first)
        # As replace() does, which calls the constructor: on a GPU each microsecond counts.
        call: FusedCall = object.__new__(type(self))
        vars(call).update(vars(self), output=heads_first(output), place=place)
        return call

    def detached(self) -> FusedCall:
        """Return the call outside of autograd's graph, without output."""
        call = self._same_dtype()
        query, key, value = (tensor.detach() for tensor in (call.query, call.key, call.value))
        return replace(call, query=query, key=key, value=value, output=None, place=None)

    def at(self, rows: list[int]) -> FusedCall:
        """Return the call of some queries only. ``tile`` is told their positions."""
        bias = self._dense_bias
        if bias is not None:
            bias = bias_of_rows(bias, rows)
        return replace(self, query=self.query[:, :, rows], bias=bias)

    def wide(self) -> FusedCall:
        """Return the call in float32 at least."""
        query, key = self.query.to(self._wide), self.key.to(self._wide)
        value = key if self.value is self.key else self.value.to(self._wide)
        return replace(self, query=query, key=key, value=value)

    def tile(
        self, sample: int, heads: slice, lines: slice, positions: Tensor, memory: Tensor
    ) -> Tensor:
        """Return some rows of the weights of one sample, ``(heads, lines, N)``, in ``memory``.

        Args:
            sample: The sample.
            heads: The heads.
            lines: The rows among the queries of the call.
            positions: The positions of these rows in their sequence.
            memory: A flat tensor of at least that many elements.

        """
        query = self.query[None, sample, heads, lines]
        bias = self._dense_bias
        if bias is not None:
            whole = (*self.query.shape[:3], self.key.shape[2])
            bias = bias.expand(whole)[None, sample, heads, lines]
        shape = (*query.shape[:3], self.columns)
        return attention_weights(
            query,
            self._of_heads(self.key, sample, heads),
            self.scale,
            bias=bias,
            causal_rows=positions if self.is_causal else None,
            out=memory[: math.prod(shape)].view(shape),
        )[0]

    def gradient_tile(self, gradient: Tensor, sample: int, heads: slice, lines: slice) -> Tensor:
        """Return the gradient by a ``tile``, given that by the output."""
        value = self._of_heads(self.value, sample, heads)[0]
        return gradient[sample, heads, lines].to(value.dtype) @ value.transpose(-2, -1)

    def _of_heads(self, keys: Tensor, sample: int, heads: slice) -> Tensor:
        """Return the keys or values of some heads of a sample. All heads may share one."""
        if keys.shape[1] == 1:
            return keys[None, sample]
        each = self.heads // keys.shape[1]
        if each == 1:
            return keys[None, sample, heads]
        return keys[None, sample, [i // each for i in range(self.heads)[heads]]]

    def weights(
        self, queries: Queries = None, heads: Heads = None, new: NewResult = new_result
    ) -> Tensor | list[Tensor]:
        """Return the weights before dropout, ``(B, heads, Q, N)``, in the dtype of the query.

        A block-diagonal bias gives a list, one tensor for each element that was nested.
        """
        call = self._same_dtype()
        if not is_block_diagonal(self.bias):
            return call._weights(queries, heads, new)
        return [part._weights(queries, heads, new) for part in call._groups()]

    def gradients(
        self, gradient: Tensor, queries: Queries = None, heads: Heads = None
    ) -> Tensor | list[Tensor]:
        """Return the gradients by the weights, which have the shapes of ``weights``.

        Args:
            gradient: That by the output, ``(B, heads, Q, d)``.
            queries: The rows.
            heads: None for each head, ``"mean"`` for the mean of their gradients.

        """
        call = replace(self, output=gradient)
        found = [part._gradients(queries, heads) for part in call._parts()]
        return found if is_block_diagonal(self.bias) else found[0]

    def facets(self, names: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return copies of the query, the key or the value, one dict for each result."""
        return [
            {
                name: getattr(part, name).clone(memory_format=torch.contiguous_format)
                for name in names
            }
            for part in self._same_dtype()._parts()
        ]

    def check(self, module: str, *, one_head: bool = False) -> None:
        """Raise ``UnfaithfulError`` unless ``weights @ value`` is the output, on a few rows.

        The rows are those of every head, or with ``one_head`` of one head of one sample, others
        each time. Where no value is finite there is nothing to compare: that raises
        ``InvalidInputError``.
        """
        verify(self.proofs(module, one_head=one_head))

    def proofs(self, module: str, *, one_head: bool = False) -> list[Proof]:
        """Return what ``check`` compares, for ``verify``. Nothing waits for the device until then.

        A call without an output, or whose kernel drops weights, has none.
        """
        if self.output is None or self.dropout:
            return []
        parts = [p for p in self._same_dtype()._parts() if p.query.numel() and p.key.numel()]
        return [(part._one_head() if one_head else part)._proof(module) for part in parts]

    def _same_dtype(self) -> FusedCall:
        """Return the call in the dtype in which the kernel ran: autocast's, where it is on."""
        out = self.output
        same = self.query.dtype == self.key.dtype == self.value.dtype
        if same and not may_autocast(self.query.device):
            return self
        if out is None:
            query, key, value = (t[:1, :1, :1] for t in (self.query, self.key, self.value))
            try:
                out = F.scaled_dot_product_attention(query, key, value)
            except RuntimeError:  # sdpa_kernel may leave a kernel that takes no single key
                out = query @ key.mT
        if same and self.query.dtype == out.dtype:
            return self
        query, key, value = (t.to(out.dtype) for t in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)

    @property
    def _wide(self) -> torch.dtype:
        """The dtype of scores: float32 at least."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def _by_query_head(self) -> tuple[Tensor, Tensor]:
        """Key and value with one head for each head of the query."""
        heads = self.query.shape[1]
        return self._repeated(self.key, heads), self._repeated(self.value, heads)

    @staticmethod
    def _repeated(tensor: Tensor, heads: int) -> Tensor:
        each = heads // max(1, tensor.shape[1])
        return tensor if each == 1 else tensor.repeat_interleave(each, 1)

    @cached_property
    def _dense_bias(self) -> Tensor | None:
        if self.bias is None:
            return None
        if not is_known(self.bias):
            raise unknown(self.bias)
        shape = (*self.query.shape[:3], self.key.shape[2])
        return dense(self.bias, shape, self.query.device, self._wide)

    def _weights(self, queries: Queries, heads: Heads, new: NewResult) -> Tensor:
        rows = to_index(queries, self.query.shape[2])
        query, (key, _) = self.query[:, :, rows], self._by_query_head
        with without_needless_grad(query, key, self.bias):
            out = new(query, shape_of_weights(query, key, heads)) if may_tile(query) else None
            return self._of_rows(query, key, rows, heads, out)

    def _of_rows(
        self, query: Tensor, key: Tensor, rows: Rows, heads: Heads = None, out: Tensor | None = None
    ) -> Tensor:
        bias = self._dense_bias
        if bias is not None:
            bias = bias_of_rows(bias, rows)
        causal = None
        if self.is_causal:
            causal = torch.arange(self.query.shape[2], device=query.device)[rows]
        return attention_weights(
            query,
            key,
            self.scale,
            bias=bias,
            causal_rows=causal,
            heads=heads,
            out=out,
        )

    def _gradients(self, queries: Queries, heads: Heads) -> Tensor:
        rows = to_index(queries, self.query.shape[2])
        gradient = self.query if self.output is None else self.output
        return weight_gradients(gradient[:, :, rows], self._by_query_head[1], heads)

    def _parts(self) -> list[FusedCall]:
        """Return the call of each element of a nested list, or this one."""
        return self._groups() if is_block_diagonal(self.bias) else [self]

    def _groups(self) -> list[FusedCall]:
        """Return the call of each element of a nested list."""
        tokens = self.query.transpose(1, 2)
        return [self._of_group(group) for group in groups(self.bias, tokens, self._wide)]

    def _of_group(self, group: Group) -> FusedCall:
        def split(tensor: Tensor, where: slice) -> Tensor:
            return group.split(tensor.transpose(1, 2), where).transpose(1, 2)

        return replace(
            self,
            query=split(self.query, group.queries),
            key=split(self.key, group.keys),
            value=split(self.value, group.keys),
            bias=group.mask,
            output=None if self.output is None else split(self.output, group.queries),
        )

    def _one_head(self) -> FusedCall:
        """Return the call of one head of one sample, drawn at random."""
        sample, head = _CHOICE.randrange(self.batch), _CHOICE.randrange(self.heads)

        def one(tensor: Tensor) -> Tensor:
            return tensor[sample : sample + 1, head : head + 1]

        bias = self._dense_bias
        if bias is not None:
            bias = one(bias.expand(*self.query.shape[:3], self.columns))
        key, value = map(one, self._by_query_head)
        output = None if self.output is None else one(self.output)
        return replace(self, query=one(self.query), key=key, value=value, bias=bias, output=output)

    @torch.no_grad()
    def _proof(self, module: str) -> Proof:
        key, value = (tensor.detach() for tensor in self._by_query_head)
        output = self.query if self.output is None else self.output.detach()
        rows = some_rows(self.rows)
        query, wide = self.query.detach()[:, :, rows].to(self._wide), key.to(self._wide)
        weights = self._of_rows(query, wide, rows)
        gap = weights @ value.to(self._wide) - output[:, :, rows]
        sizes = [_largest(one) for one in (gap, query.norm(dim=-1), wide.norm(dim=-1), value)]
        sizes += [value.isfinite().any()]
        found = torch.stack([size.to(self._wide) for size in sizes])
        rounding = _ROUNDINGS * _epsilon(self.query)
        return Proof(self.kernel, module, abs(self.scale), rounding, found)


@dataclass(frozen=True, eq=False)
class Proof:
    """The difference between ``weights @ value`` and the output of a kernel, on a few rows.

    Attributes:
        kernel: The name of the kernel.
        module: What called it.
        scale: The size of the factor on ``query @ keyᵀ``.
        rounding: The relative error that is allowed, for scores of the size 0.
        sizes: The largest difference, norm of a query, norm of a key and value; and whether a value
            is finite.

    """

    kernel: str
    module: str
    scale: float
    rounding: float
    sizes: Tensor

    def read(self, error: float, query: float, key: float, value: float, finite: float) -> None:
        """Raise ``UnfaithfulError`` if the difference is larger than the kernel's own error.

        A rounding of the scores is a relative error of the weights of about their size times the
        machine epsilon. The sum with the values has errors of that size again.
        """
        if not finite:
            raise InvalidInputError(
                f"finite values at {self.kernel}, so that its weights can be proved",
                f"none in {self.module}",
                "Load a checkpoint or initialise the model, and look for NaN in the images: "
                "DINOv3's masked key bias is NaN until model.init_weights().",
            )
        allowed = self.rounding * (1 + self.scale * query * key) * value
        if not error <= allowed:
            raise UnfaithfulError(
                f"weights @ values equal to the output of {self.kernel}, within {allowed:.1e}",
                f"a difference of {error:.1e} in {self.module}",
                "Report the model: its kernel computes something else. record(..., check=False) "
                "records it unproved.",
            )


def verify(proofs: Sequence[Proof]) -> None:
    """Raise ``UnfaithfulError`` unless all ``proofs`` hold. The device is waited for once.

    Raises:
        UnfaithfulError: If weights are not those of a kernel.
        InvalidInputError: If a kernel was given no finite value.

    """
    if not proofs:
        return
    device = proofs[0].sizes.device
    sizes = torch.stack([proof.sizes.to(device, torch.float64) for proof in proofs])
    for proof, found in zip(proofs, sizes.tolist(), strict=True):
        proof.read(*found)


@dataclass(frozen=True, eq=False)
class ExplicitCall:
    """A softmax that explicit code multiplies with the values.

    Attributes:
        kernel: ``"softmax"``.
        matrix: ``(B, heads, Q, N)``, the tensor that is multiplied, before dropout.
        value: The right factor of the product.
        query: What the scores are the product of, ``(B, heads, Q, d)``, or None if that is not
            seen. A scale may be in it.
        key: The other factor, ``(B, heads, N, d)``.
        output: The product, or None if it did not run.
        dropout: The probability with which weights are dropped before the product.
        place: Where autograd makes the gradient by the matrix, or None without one.

    """

    matrix: Tensor
    value: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    output: Tensor | None = None
    kernel: str = "softmax"
    dropout: float = 0.0
    place: Place | None = None

    @property
    def rows(self) -> int:
        """The number of queries."""
        return self.matrix.shape[2]

    @property
    def batch(self) -> int:
        """The number of samples."""
        return self.matrix.shape[0]

    @property
    def columns(self) -> int:
        """The number of keys."""
        return self.matrix.shape[3]

    @property
    def heads(self) -> int:
        """The number of heads."""
        return self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.matrix.device

    @property
    def sums_to_one(self) -> bool:
        """False, because a gate or a mask may have come after the softmax."""
        return False

    @property
    def parts(self) -> Sequence[ExplicitCall]:
        """The call alone, which has no nested list."""
        return [self]

    def kept(self) -> ExplicitCall:
        """Return the call without values and output."""
        return self._without_graph(value=self.matrix, query=None, key=None)

    def ran(self, output: Tensor, heads_first: Callable[[Tensor], Tensor]) -> ExplicitCall:
        """Return the call with the product, which ``heads_first`` rearranges."""
        return replace(self, output=heads_first(output))

    def detached(self) -> ExplicitCall:
        """Return the call outside of autograd's graph, without product."""
        names = ("matrix", "value", "query", "key")
        given = {name: getattr(self, name) for name in names}
        return self._without_graph(**{k: v if v is None else v.detach() for k, v in given.items()})

    def _without_graph(self, **changes: Tensor | None) -> ExplicitCall:
        changed: Any = changes
        return replace(self, **changed, output=None, place=None)

    def at(self, rows: list[int]) -> ExplicitCall:
        """Return the call of some queries only."""
        return replace(self, matrix=self.matrix[:, :, rows])

    def wide(self) -> ExplicitCall:
        """Return the call as it is. Its rows are converted in ``tile``."""
        return self

    def tile(
        self, sample: int, heads: slice, lines: slice, positions: Tensor, memory: Tensor
    ) -> Tensor:
        """Return some rows of the weights of one sample, ``(heads, lines, N)``."""
        del positions, memory
        return _at_least_float32(self.matrix[sample, heads, lines])

    def gradient_tile(self, gradient: Tensor, sample: int, heads: slice, lines: slice) -> Tensor:
        """Return the gradient by a ``tile``, given that by the matrix."""
        return _at_least_float32(gradient[sample, heads, lines])

    def weights(
        self, queries: Queries = None, heads: Heads = None, new: NewResult = new_result
    ) -> Tensor:
        """Return the weights ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean of heads."""
        del new  # nothing is computed, so nothing is allocated
        return _chosen(self.matrix, queries, heads)

    def gradients(self, gradient: Tensor, queries: Queries = None, heads: Heads = None) -> Tensor:
        """Return the gradients by the weights, given all of them."""
        return _chosen(gradient.to(self.matrix.dtype), queries, heads)

    def facets(self, names: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return copies of what the two products were given, one dict."""
        found = {name: getattr(self, name) for name in names}
        if unseen := [name for name, tensor in found.items() if tensor is None]:
            raise InvalidInputError(
                f"explicit code whose product of queries and keys is seen, for the {unseen[0]}",
                "a softmax of something else",
                'Record facets=("value",), or let the model use its fused kernel: '
                'attn_implementation="sdpa" in transformers, fused_attn in timm.',
            )
        return [{name: _copy(tensor) for name, tensor in found.items()}]

    def check(self, module: str, *, one_head: bool = False) -> None:
        """Do nothing: the weights are the very tensor that was multiplied."""

    def proofs(self, module: str, *, one_head: bool = False) -> list[Proof]:
        """Return an empty list, because there is nothing to prove."""
        del module, one_head
        return []


KernelCall = FusedCall | ExplicitCall

# The name of PyTorch's kernel.
SDPA = "scaled_dot_product_attention"


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _chosen(matrix: Tensor, queries: Queries, heads: Heads) -> Tensor:
    rows = to_index(queries, matrix.shape[2])
    chosen = matrix if queries is None else matrix[:, :, rows]
    return chosen.mean(dim=1) if heads == "mean" else chosen


def fused_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    heads: int | None = None,
) -> FusedCall:
    """Return the call of ``scaled_dot_product_attention`` with these arguments.

    ``heads`` of the module are needed where they are part of the batch.
    """
    del enable_gqa  # fewer heads of keys say the same
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    if query.ndim == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return FusedCall(SDPA, query, key, value, scale, attn_mask, is_causal, dropout_p)
    if attn_mask is not None and query.ndim != 4 and attn_mask.ndim > 2:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        attn_mask = by_heads(attn_mask, heads)
    given = [by_heads(tensor, heads) for tensor in (query, key, value)]
    query, key, value = _of_one_batch(given)
    return FusedCall(SDPA, query, key, value, scale, attn_mask, is_causal, dropout_p)


def _of_one_batch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return query, key and value ``(B, heads, N, d)``, of which some may serve all samples."""
    # Not len(): a graph would be of this size of batch only.
    batch = max(tensor.shape[0] for tensor in tensors)
    query, key, value = (tensor.expand(batch, -1, -1, -1) for tensor in tensors)
    if query.shape[1] == 1:
        query = query.expand(-1, max(key.shape[1], value.shape[1]), -1, -1)
    return [query, key, value]


def dim_of_heads(shape: Sequence[int], heads: int | None) -> int:
    """Return the dimension of the heads: -3, or another one before windows."""
    if len(shape) < 5 or shape[-3] == heads:
        return -3
    found = [dim for dim in range(len(shape) - 3) if shape[dim] == heads]
    return found[0] if len(found) == 1 else -3


def by_heads(tensor: Tensor, heads: int | None) -> Tensor:
    """Return ``tensor`` as ``(B, heads, N, d)``.

    A tensor ``(B · heads, N, d)`` is split. One ``(B, windows, heads, N, d)`` or ``(B, heads,
    windows, N, d)`` has its windows in the batch.
    """
    if tensor.ndim > 4:
        return tensor.movedim(dim_of_heads(tensor.shape, heads), -3).flatten(0, -4)
    if tensor.ndim == 4:
        return tensor
    tensor = tensor if tensor.ndim == 3 else tensor[None]
    if heads is None or tensor.shape[0] % heads:
        return tensor[:, None]
    return tensor.reshape(-1, heads, *tensor.shape[1:])


def as_given(tensor: Tensor, shape: Sequence[int], heads: int | None) -> Tensor:
    """Return ``(B, heads, N, d)`` in the ``shape`` of which ``by_heads`` made it."""
    if len(shape) < 5:
        return tensor.reshape(shape)
    dim, sizes = dim_of_heads(shape, heads), list(shape)
    sizes.insert(len(sizes) - 3, sizes.pop(dim))
    return tensor.reshape(sizes).movedim(-3, dim)


def some_rows(length: int) -> slice:
    """Return a few positions below ``length``, others each time. No state of torch's is drawn.

    They lie side by side: positions in a list would have to be copied to the device.
    """
    count = min(PROVED_ROWS, length)
    start = _CHOICE.randrange(length - count + 1)
    return slice(start, start + count)


_CHOICE = random.Random()


def _largest(tensor: Tensor) -> Tensor:
    """Return the largest size of a finite number: one sample may be NaN."""
    tensor = tensor.nan_to_num(posinf=0, neginf=0)  # NaN becomes 0 too
    low, high = tensor.aminmax()
    return torch.maximum(-low, high)


def _epsilon(tensor: Tensor) -> float:
    tf32 = tensor.is_cuda and torch.backends.cuda.matmul.allow_tf32
    if tf32 and tensor.dtype == torch.float32:
        return 2.0**-10
    return torch.finfo(tensor.dtype).eps
