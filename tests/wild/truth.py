"""What each attention kernel of one pass was given, in float64: shares no code with the package.

Kernels are caught where the model calls them:

* ``scaled_dot_product_attention`` by its name. Each module, class, object and dictionary that
  holds the function gets another one, which calls the real one and keeps its arguments.
* xFormers' ``memory_efficient_attention`` by its name in the modules that hold it.
* A softmax that the model computes itself, by a ``TorchFunctionMode`` around the pass: it counts
  once a product takes it, or its dropout, cast or view, as a factor.

Each call checks itself: its weights times the values are what the kernel returned.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

SDPA = functional.scaled_dot_product_attention
SDPA_NAME = "scaled_dot_product_attention"
XFORMERS_NAME = "memory_efficient_attention"
SOFTMAXES = {"softmax"}
PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum"}
SAME_VALUES = {
    *("dropout", "to", "type", "type_as", "float", "half", "bfloat16", "double"),
    *("contiguous", "detach"),
}
VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose"),
    *("permute", "expand", "__getitem__"),
}

# The error of the model's own kernel, relative to the largest value that it returns.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


class TruthError(AssertionError):
    """What was caught does not explain what the model computed."""


@dataclass(frozen=True)
class KernelCall:
    """One call of a kernel.

    Attributes:
        path: The innermost module that ran, by its name in the model; ``""`` for the model.
        kernel: ``"sdpa"``, ``"xformers"`` or ``"softmax"``.
        weights: ``(…, Q, N)`` in float64, as the kernel has them before dropout.
        error: Largest difference between weights times values and the output of the kernel,
            relative to the largest value of that output.

    """

    path: str
    kernel: str
    weights: Tensor
    error: float


def attention_of(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[KernelCall]:
    """Run ``model`` once and return its kernel calls in their order.

    Args:
        model: Any model, in eval mode, so that nothing is dropped.
        run: Runs it once.

    Raises:
        TruthError: A call does not explain its output, or went past the replaced names.

    """
    catcher = _Catcher()
    with ExitStack() as stack:
        stack.enter_context(_running_modules(model, catcher))
        stack.enter_context(_replaced(SDPA_NAME, SDPA, catcher.sdpa, model))
        stack.enter_context(_replaced_xformers(catcher))
        stack.enter_context(_Watch(catcher))
        run(model)
    if catcher.missed:
        raise TruthError(f"{catcher.missed} calls of {SDPA_NAME} went past the replaced names")
    return catcher.calls


def exact_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(q kᵀ · scale + mask) in float64; rows without a key are zero.

    Args:
        query: ``(…, heads, Q, D)``.
        key: ``(…, heads, N, D)``, or fewer heads that divide the query's (grouped queries).
        mask: Boolean (True is seen) or added to the scores; broadcast to ``(…, Q, N)``.
        is_causal: Query ``i`` sees keys up to ``i``.
        scale: ``D ** -0.5`` by default.

    """
    q, k = query.detach().double(), key.detach().double()
    if k.ndim >= 4 and k.shape[-3] != q.shape[-3]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.detach().double()
    return scores.softmax(-1).nan_to_num(0.0)


@dataclass
class _Catcher:
    calls: list[KernelCall] = field(default_factory=list)
    running: list[str] = field(default_factory=lambda: [""])
    missed: int = 0
    inside: bool = False  # of a replaced name, which calls the real function

    def sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Any:
        out = self._real(SDPA)(query, key, value, attn_mask, dropout_p, is_causal, **options)
        weights = exact_weights(query, key, attn_mask, is_causal, options.get("scale"))
        v = value.detach().double()
        if v.ndim >= 4 and v.shape[-3] != weights.shape[-3]:
            v = v.repeat_interleave(weights.shape[-3] // v.shape[-3], -3)
        self.add("sdpa", weights, weights @ v, out)
        return out

    def xformers(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def memory_efficient_attention(
            query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, **options: Any
        ) -> Any:
            out = self._real(real)(query, key, value, attn_bias=attn_bias, **options)
            q, k, v = (t.transpose(1, 2) if t.ndim == 4 else t for t in (query, key, value))
            mask = attn_bias
            if not (mask is None or isinstance(mask, Tensor)):
                mask = mask.materialize((*q.shape[:-1], k.shape[-2]), device=q.device)
            weights = exact_weights(q, k, mask, scale=options.get("scale"))
            product = weights @ v.detach().double()
            self.add("xformers", weights, product.transpose(1, 2) if q.ndim == 4 else product, out)
            return out

        return memory_efficient_attention

    def _real(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            before, self.inside = self.inside, True
            try:
                return function(*arguments, **options)
            finally:
                self.inside = before

        return call

    def add(self, kernel: str, weights: Tensor, expected: Tensor, out: Tensor) -> None:
        found = out.detach().double().nan_to_num(0.0)
        largest = max(float(found.abs().max()), 1e-30)
        error = float((expected - found).abs().max()) / largest
        if not error <= TOLERANCES[out.dtype]:
            where = self.running[-1] or "the model"
            raise TruthError(f"weights @ v of {where} differs by {error:.1e} from its {kernel}")
        self.calls.append(KernelCall(self.running[-1], kernel, weights, error))


class _Watch(TorchFunctionMode):
    """Sees softmaxes, the products that take them, and kernels that no replaced name caught."""

    def __init__(self, catcher: _Catcher) -> None:
        super().__init__()
        self.catcher = catcher
        self.exact: dict[int, Tensor] = {}  # float64, by the id of the tensor it stands for
        self.origin: dict[int, Tensor] = {}  # the softmax that it came from
        self.alive: list[Tensor] = []  # else an id could be given away

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func is SDPA:
            self.catcher.missed += not self.catcher.inside
        elif self.catcher.inside:
            pass
        elif name in SOFTMAXES:
            self._softmax(out, *args, **kwargs)
        elif name in SAME_VALUES | VIEWS and args and id(args[0]) in self.exact:
            exact = self.exact[id(args[0])]
            self._keep(
                out,
                func(exact, *args[1:], **kwargs) if name in VIEWS else exact,
                self.origin[id(args[0])],
            )
        elif name == "clone" and args and id(args[0]) in self.exact:
            exact = self.exact[id(args[0])].clone()  # what is written into the copy stays in it
            self._keep(out, exact, exact)
        elif name == "__setitem__" and id(args[0]) in self.exact:
            func(self.exact[id(args[0])], *args[1:])
        elif name in PRODUCTS and self.exact:
            self._product(func, out, args, kwargs)
        return out

    def _softmax(
        self, out: Tensor, scores: Tensor, dim: Any = None, *_: Any, **options: Any
    ) -> None:
        axis = options.get("dim", dim)
        exact = scores.detach().double().softmax(-1 if axis is None else axis).nan_to_num(0.0)
        self._keep(out, exact, exact)

    def _keep(self, out: Tensor, exact: Tensor, origin: Tensor) -> None:
        self.alive.append(out)
        self.exact[id(out)], self.origin[id(out)] = exact, origin

    def _product(self, func: Any, out: Tensor, args: tuple[Any, ...], kwargs: Any) -> None:
        flat = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg])]
        factors = [a for a in flat if id(a) in self.exact]
        if factors:
            expected = func(*map(self._in_float64, args), **kwargs)
            self.catcher.add("softmax", self.origin[id(factors[0])], expected, out)

    def _in_float64(self, argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return type(argument)(map(self._in_float64, argument))
        if not isinstance(argument, Tensor):
            return argument
        return self.exact.get(id(argument), argument.detach().double())


@contextmanager
def _running_modules(model: nn.Module, catcher: _Catcher) -> Iterator[None]:
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, arguments: Any) -> None:
        catcher.running.append(names.get(module, catcher.running[-1]))

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        catcher.running.pop()

    hooks = (
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replaced(name: str, real: Any, new: Any, model: nn.Module) -> Iterator[None]:
    """Put ``new`` wherever ``real`` is held; a model may keep it as an attribute."""
    undo: list[Callable[[], None]] = []
    try:
        for holder in _holders(model):
            for key, value in list(holder.items()):
                if value is real:
                    undo.append(_set(holder, key, new))
        for cls in {cls for module in model.modules() for cls in type(module).__mro__}:
            for key, value in list(vars(cls).items()):
                if getattr(value, "__func__", value) is real:
                    setattr(cls, key, staticmethod(new))
                    undo.append(partial(setattr, cls, key, value))
        yield
    finally:
        for step in reversed(undo):
            step()


def _holders(model: nn.Module) -> Iterator[dict[Any, Any]]:
    for module in list(sys.modules.values()):
        names: dict[Any, Any] = getattr(module, "__dict__", None) or {}
        name = str(names.get("__name__", __name__))
        # Modes are handed what torch._C names: the real function stays there.
        if name != __name__ and not name.startswith("torch._C"):
            yield names
            yield from (value for value in list(names.values()) if type(value) is dict)
    yield from (vars(module) for module in model.modules())


def _set(holder: dict[Any, Any], key: Any, new: Any) -> Callable[[], None]:
    before = holder[key]
    holder[key] = new

    def undo() -> None:
        holder[key] = before

    return undo


@contextmanager
def _replaced_xformers(catcher: _Catcher) -> Iterator[None]:
    undo = []
    try:
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", None) or {}
            outside = not str(names.get("__name__")).startswith("xformers")
            if outside and callable(names.get(XFORMERS_NAME)):
                undo.append(_set(names, XFORMERS_NAME, catcher.xformers(names[XFORMERS_NAME])))
        yield
    finally:
        for step in undo:
            step()
