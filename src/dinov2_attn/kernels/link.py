"""Making the weights beside a fused kernel a part of the graph of what it returned.

A fused kernel makes no weights, so its output does not depend on those that are computed beside it.
A link is the same output with an edge to them. In a backward pass it gives them
``d output @ valueᵀ``, the gradient that explicit attention has there. The kernel's own backward
gives query and key what follows from that. So a hook removes it behind the weights, before it goes
on to query and key a second time. What else is made of the weights has its gradients as before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dinov2_attn._compat import after_backward, backward_pass, has_tangents
from dinov2_attn.kernels.call import ExplicitCall
from dinov2_attn.kernels.capture import Change
from dinov2_attn.kernels.place import Place
from dinov2_attn.math.gradients import product_with_values

Note = Callable[[Tensor], None]


def link_of(call: Any, weights: Any) -> Change | None:
    """Return what puts ``weights`` into the graph of what the kernel of ``call`` returned.

    The weights of explicit code are part of it already, and those of nested lists stay outside.

    Args:
        call: What a kernel was given and returned, edited or not.
        weights: All of its weights, ``(B, heads, Q, N)``.

    """
    if isinstance(call, ExplicitCall) or isinstance(weights, list) or call.dropout:
        return None
    if getattr(call, "is_own", False):  # the output is made of these very weights already
        return None
    if call.place is None or weights.grad_fn is None or has_tangents():
        return None
    return partial(_linked, call.place, call.value, weights)


def _linked(place: Place, value: Tensor, weights: Tensor, output: Tensor) -> Tensor:
    """Return ``output``, the same numbers in the same memory, with an edge to ``weights``."""
    if type(output) is not Tensor:
        return output
    given: dict[int, Tensor] = {}  # by backward pass: what the weights were given from here
    node: Any = weights.grad_fn
    node.register_prehook(partial(_take_off, given, weights.output_nr))
    linked: Tensor = _Link.apply(output, weights, value, place, partial(_note, given))
    return linked


def _note(given: dict[int, Tensor], gradient: Tensor) -> None:
    """Keep ``gradient`` until the backward pass of this thread is over."""
    number = backward_pass()
    given[number] = gradient
    # The node of the weights may have no part in this pass, and so never ask for it.
    after_backward(partial(_forget, given, number))


def _forget(given: dict[int, Tensor], number: int) -> None:
    given.pop(number, None)


def _take_off(
    given: dict[int, Tensor], number: int, gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients by the weights without what they were given from the kernel's output."""
    own, total = given.pop(backward_pass(), None), gradients[number]
    if own is None or total is None:
        return None
    rest = None if total is own else total - own
    return tuple(rest if i == number else gradient for i, gradient in enumerate(gradients))


class _Link(torch.autograd.Function):
    """The identity of a kernel's output, which gives the weights their gradient."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, weights: Tensor, value: Tensor, place: Place, note: Note
    ) -> Tensor:
        ctx.save_for_backward(value)
        ctx.set_materialize_grads(False)
        ctx.heads_first, ctx.dtype, ctx.note = place.heads_first, weights.dtype, note
        # No view: code may write into what its kernel returned.
        return output.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if gradient is None:
            return None, None, None, None, None
        (value,) = ctx.saved_tensors
        by_output = ctx.heads_first(gradient)
        value = value.repeat_interleave(by_output.shape[1] // value.shape[1], 1)
        by_weights = product_with_values(by_output, value).to(ctx.dtype)
        ctx.note(by_weights)
        return gradient, by_weights, None, None, None
