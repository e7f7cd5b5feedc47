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

from tests.wild.replaced import replaced, replaced_by_name
from tests.wild.softmaxes import Softmaxes

SDPA = functional.scaled_dot_product_attention
XFORMERS = "memory_efficient_attention"

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
        stack.enter_context(replaced(SDPA, catcher.sdpa, model))
        stack.enter_context(replaced_by_name(XFORMERS, "xformers", catcher.xformers))
        stack.enter_context(Softmaxes(partial(catcher.add, "softmax")))
        stack.enter_context(_Missed(catcher))
        run(model)
    if catcher.missed:
        raise TruthError(f"{catcher.missed} calls of {SDPA.__name__} went past the replaced names")
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
        with torch._C.DisableTorchFunction():  # no mode sees what is computed here
            out = SDPA(query, key, value, attn_mask, dropout_p, is_causal, **options)
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
            with torch._C.DisableTorchFunction():
                out = real(query, key, value, attn_bias=attn_bias, **options)
                q, k, v = (t.transpose(1, 2) if t.ndim == 4 else t for t in (query, key, value))
                mask = attn_bias
                if not (mask is None or isinstance(mask, Tensor)):
                    mask = mask.materialize((*q.shape[:-1], k.shape[-2]), device=q.device)
                weights = exact_weights(q, k, mask, scale=options.get("scale"))
                product = weights @ v.detach().double()
                expected = product.transpose(1, 2) if q.ndim == 4 else product
                self.add("xformers", weights, expected, out)
                return out

        return memory_efficient_attention

    def add(self, kernel: str, weights: Tensor, expected: Tensor, out: Tensor) -> None:
        found = out.detach().double().nan_to_num(0.0)
        largest = max(float(found.abs().max()), 1e-30)
        error = float((expected - found).abs().max()) / largest
        if not error <= TOLERANCES[out.dtype]:
            where = self.running[-1] or "the model"
            raise TruthError(f"weights @ v of {where} differs by {error:.1e} from its {kernel}")
        self.calls.append(KernelCall(self.running[-1], kernel, weights, error))


class _Missed(TorchFunctionMode):
    """Counts kernels that no replaced name caught."""

    def __init__(self, catcher: _Catcher) -> None:
        super().__init__()
        self.catcher = catcher

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.catcher.missed += func is SDPA
        return func(*args, **(kwargs or {}))


@contextmanager
def _running_modules(model: nn.Module, catcher: _Catcher) -> Iterator[None]:
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, arguments: Any) -> None:
        catcher.running.append(names.get(module, catcher.running[-1]))

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        catcher.running.pop()

    hooks = (
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
