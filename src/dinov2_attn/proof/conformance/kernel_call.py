"""What the attention kernels of a model were given in one call, without any graft."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dinov2_attn.kernels.xformers import FLAG, KERNEL
from dinov2_attn.math.bias import dense

_ATTENTION = re.compile("att(entio)?n", re.IGNORECASE)


@dataclass(frozen=True)
class KernelCall:
    """One kernel call. Tensors are float64, of ``(B, heads, N, head_dim)`` or ``(B·heads, …)``.

    Attributes:
        query, key: ``None`` where unknown operations stand between the product and the softmax.
        value: As the kernel was given it.
        scale: The factor on ``query @ keyᵀ``.
        bias: What was added to the logits, ``-inf`` where masked; ``None`` without one.
        weights: The attention weights, before dropout.
        dropped: The weights after dropout; the same where there is none.
        output: ``weights @ value``, as the kernel returned it.

    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor
    scale: float
    bias: Tensor | None
    weights: Tensor
    dropped: Tensor
    output: Tensor


Calls = dict[str, list[KernelCall]]


def caught(
    module: nn.Module, run: Callable[[], Any], *, xformers: bool = False
) -> tuple[Any, Calls]:
    """Run ``run``, and return its result and the kernel calls of each attention module.

    Args:
        module: The module whose attention modules are watched; it may be one itself.
        run: Calls ``module`` or its methods.
        xformers: Which branch runs where the code has two. The kernel of xFormers is replaced by
            its definition, which runs on every device and without xFormers.

    Returns:
        The result, and the calls by the name of the attention module, in the order in which
        these ran first. A kernel that takes its softmax by hand is not seen.

    """
    watch = _Watch()
    with ExitStack() as stack:
        stack.enter_context(_branch(module, xformers, watch.xformers))
        for name, attention in module.named_modules():
            if _may_attend(attention):
                stack.enter_context(_watched(attention, name, watch))
        return run(), watch.calls


def has_two_branches(module: nn.Module) -> bool:
    """Return whether the code of ``module`` asks in every pass whether xFormers is there."""
    return any(FLAG in space for space in _namespaces(module))


def explicit(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Return ``softmax(query @ keyᵀ · scale + bias)``, computed in float64."""
    logits = query.double() @ key.double().mT * scale
    return (logits if bias is None else logits + bias).softmax(-1)


def _may_attend(module: nn.Module) -> bool:
    return hasattr(module, "qkv") or _ATTENTION.search(type(module).__name__) is not None


@contextmanager
def _watched(module: nn.Module, name: str, watch: _Watch) -> Iterator[None]:
    """Enter the mode inside each ``forward`` of ``module``, and nowhere else."""
    own = "forward" in vars(module)
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        watch.running.append((name, _Notes()))
        try:
            with _Mode(watch):
                return forward(*args, **kwargs)
        finally:
            watch.running.pop()

    vars(module)["forward"] = watched
    try:
        yield
    finally:
        if own:
            vars(module)["forward"] = forward
        else:
            del vars(module)["forward"]


def _namespaces(module: nn.Module) -> list[dict[str, Any]]:
    """Return the globals of the modules that define the classes of ``module``."""
    classes = {base for part in module.modules() for base in type(part).__mro__}
    names = sorted({cls.__module__ for cls in classes if not cls.__module__.startswith("torch.")})
    spaces = [vars(sys.modules[name]) for name in names if name in sys.modules]
    ops = sys.modules.get("xformers.ops")
    return spaces if ops is None else [*spaces, vars(ops)]


@contextmanager
def _branch(module: nn.Module, xformers: bool, kernel: Callable[..., Tensor]) -> Iterator[None]:
    """Choose a branch by the globals that the code reads, and put them back."""
    before = []
    for space in _namespaces(module):
        changes: dict[str, Any] = {KERNEL: kernel} if KERNEL in space else {}
        if FLAG in space:
            changes |= {FLAG: xformers, KERNEL: kernel, "unbind": space.get("unbind", torch.unbind)}
        before.append((space, {name: space.get(name, _ABSENT) for name in changes}))
        space.update(changes)
    try:
        yield
    finally:
        for space, names in before:
            for name, value in names.items():
                if value is _ABSENT:
                    del space[name]
                else:
                    space[name] = value


_ABSENT = object()


@dataclass
class _Watch:
    """The attention modules that run, innermost last, and the kernel calls so far."""

    running: list[tuple[str, _Notes]] = field(default_factory=list)
    calls: Calls = field(default_factory=dict)

    def add(self, call: KernelCall) -> None:
        self.calls.setdefault(self.running[-1][0], []).append(call)

    def xformers(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        """Compute what xFormers documents its kernel to compute, on ``(B, N, heads, head_dim)``."""
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if attn_bias is not None:
            shape = (*q.shape[:3], k.shape[2])
            attn_bias = _additive(dense(attn_bias, shape, q.device, q.dtype))
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        output = (explicit(q, k, factor, attn_bias) @ v.double()).to(q.dtype)
        if self.running:
            self.add(_fused(q, k, v, factor, attn_bias, output))
        return output.transpose(1, 2)

    def sdpa(
        self,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Note a call of PyTorch's kernel, by the names of its arguments."""
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = (tensor.repeat_interleave(repeats, -3) for tensor in (key, value))
        bias = _additive(attn_mask)
        if is_causal:
            allowed = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
            bias = _additive(allowed)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        self.add(_fused(query, key, value, factor, bias, output))


def _fused(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None, output: Tensor
) -> KernelCall:
    weights = explicit(query, key, scale, bias)
    return KernelCall(
        _copy(query), _copy(key), _copy(value), scale, bias, weights, weights, _copy(output)
    )


def _additive(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else _copy(mask)
    return torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_fill(
        ~mask, float("-inf")
    )


def _copy(tensor: Tensor) -> Tensor:
    # The code may change the tensor in place after the call.
    return tensor.detach().to(torch.float64, copy=True)


@dataclass(frozen=True)
class _Scaled:
    """A tensor that is ``base · factor``."""

    base: Tensor
    factor: float


@dataclass(frozen=True)
class _Logits:
    """A tensor that is ``query @ keyᵀ · scale + bias``."""

    query: Tensor
    key: Tensor
    scale: float
    bias: Tensor | None = None


@dataclass(frozen=True)
class _Weights:
    """A softmax, and what it is the softmax of."""

    logits: _Logits | None
    weights: Tensor
    dropped: Tensor


_Known = _Scaled | _Logits | _Weights


class _Notes:
    """What is known of the tensors of one running attention module."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, _Known]] = {}

    def of(self, tensor: Any) -> _Known | None:
        return self._known.get(id(tensor), (None, None))[1]

    def add(self, tensor: Tensor, known: _Known) -> None:
        # The tensor is kept, so that no other one gets its id.
        self._known[id(tensor)] = tensor, known


# What stands between a softmax and its product, or a scale and its product.
_ALIASES = {"dropout", "to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "clone"}
_MOVES = {"transpose", "permute", "contiguous"}
_PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum"}
_FACTORS = {"mul": 1, "__mul__": 1, "__rmul__": 1, "mul_": 1, "__imul__": 1, "multiply": 1}
_FACTORS |= {"div": -1, "__truediv__": -1, "true_divide": -1, "div_": -1, "__itruediv__": -1}
_IN_PLACE = {"mul_", "__imul__", "div_", "__itruediv__"}
_SUMS = {"add", "__add__", "__radd__", "__iadd__", "add_"}


class _Mode(TorchFunctionMode):
    """Note the kernel calls of the innermost attention module."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func is F.scaled_dot_product_attention:
            self._watch.sdpa(output, *args, **kwargs)
        elif name in _PRODUCTS:
            self._product(name, output, [arg for arg in _flat(args) if isinstance(arg, Tensor)])
        elif args and isinstance(output, Tensor):
            known = _follow(self._notes, name, func, output, args, kwargs)
            if known is not None:
                self._notes.add(output, known)
        return output

    @property
    def _notes(self) -> _Notes:
        return self._watch.running[-1][1]

    def _product(self, name: str, output: Tensor, factors: list[Tensor]) -> None:
        left, right = (*factors, None, None)[:2]
        known = self._notes.of(left)
        if left is None or right is None:
            return
        if isinstance(known, _Weights):
            self._watch.add(_by_hand(known, right, output))
        elif name != "einsum" and right.ndim >= 3:
            (q, a), (k, b) = self._base(left), self._base(right)
            self._notes.add(output, _Logits(q, k.mT, a * b))

    def _base(self, tensor: Tensor) -> tuple[Tensor, float]:
        known = self._notes.of(tensor)
        if isinstance(known, _Scaled):
            return _copy(known.base), known.factor
        return _copy(tensor), 1.0


def _follow(
    notes: _Notes, name: str, func: Any, output: Tensor, args: Sequence[Any], kwargs: Any
) -> _Known | None:
    """Return what ``output`` of the function ``name`` is, ``None`` if that is not known."""
    first, *rest = args
    known = notes.of(first)
    if name == "softmax":
        logits = known if isinstance(known, _Logits) else None
        return _Weights(logits, _copy(output), _copy(output))
    if isinstance(known, _Weights) and name in _ALIASES:
        return _Weights(known.logits, known.weights, _copy(output))
    if isinstance(known, _Logits):
        return _changed(known, name, rest)
    if isinstance(known, _Scaled) and name in _MOVES:
        return _Scaled(func(known.base, *rest, **kwargs), known.factor)
    factor = _factor(name, rest)
    if factor is None or name in _IN_PLACE:
        return None
    base, before = (known.base, known.factor) if isinstance(known, _Scaled) else (first, 1.0)
    return _Scaled(base, before * factor)


def _changed(logits: _Logits, name: str, rest: Sequence[Any]) -> _Logits | None:
    """Return logits after the function ``name``, ``None`` if it is another than expected."""
    q, k, scale, bias = logits.query, logits.key, logits.scale, logits.bias
    factor = _factor(name, rest)
    if factor is not None and bias is None:
        return _Logits(q, k, scale * factor)
    more = None
    if name in _SUMS and rest and isinstance(rest[0], Tensor):
        more = _copy(rest[0])
    elif name in ("masked_fill", "masked_fill_"):
        more = torch.zeros_like(rest[0], dtype=torch.float64).masked_fill(rest[0], float(rest[1]))
    elif name in _ALIASES:
        return logits
    if more is None:
        return None
    return _Logits(q, k, scale, more if bias is None else bias + more)


def _factor(name: str, rest: Sequence[Any]) -> float | None:
    if name not in _FACTORS or not rest:
        return None
    by = rest[0]
    is_number = isinstance(by, int | float) or (isinstance(by, Tensor) and by.numel() == 1)
    return float(by) ** _FACTORS[name] if is_number else None


def _by_hand(known: _Weights, value: Tensor, output: Tensor) -> KernelCall:
    logits = known.logits
    return KernelCall(
        query=None if logits is None else logits.query,
        key=None if logits is None else logits.key,
        value=_copy(value),
        scale=1.0 if logits is None else logits.scale,
        bias=None if logits is None else logits.bias,
        weights=known.weights,
        dropped=known.dropped,
        output=_copy(output),
    )


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value
