"""The kernel calls of a pass with the gradients that a target has there.

For each layer that is what the kernel was given, and the gradient at its output: O(N · C) numbers.
Explicit code has made its matrix already, which is kept, and so is the gradient by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov2_attn.errors import InvalidInputError, NotRecordedError
from dinov2_attn.grafting.channel import prove_once
from dinov2_attn.kernels.call import KernelCall
from dinov2_attn.maps.calls import Calls
from dinov2_attn.maps.gradients import check_differentiable
from dinov2_attn.maps.layers import some_of
from dinov2_attn.maps.tiles import tiles
from dinov2_attn.typing import Layer


class GradedTile(NamedTuple):
    """Some rows of the weights of one sample and the gradients by them, ``(heads, lines, N)``."""

    lines: slice
    weights: Tensor
    gradients: Tensor


@dataclass(frozen=True, eq=False)
class Graded:
    """What a kernel was given, and the gradient at what it returned.

    Attributes:
        call: The call, in float32 at least.
        gradient: That by the output, or by the matrix of explicit code.

    """

    call: KernelCall
    gradient: Tensor

    def at(self, rows: list[int]) -> Graded:
        """Return that of some queries only."""
        return Graded(self.call.at(rows), self.gradient[:, :, rows])

    def tiles(self, sample: int, positions: Tensor, together: int) -> Iterator[GradedTile]:
        """Yield the rows of a ``sample`` in tiles of so many heads. They share their memory."""
        for heads, lines, weights in tiles(self.call, sample, positions, together):
            gradients = self.call.gradient_tile(self.gradient, sample, heads, lines)
            yield GradedTile(lines, weights, gradients)


def check_parameters(model: nn.Module) -> None:
    """Raise ``InvalidInputError`` if autograd cannot use the parameters of ``model``."""
    if any(tensor.is_inference() for tensor in model.parameters()):
        raise InvalidInputError(
            "a model whose parameters autograd can use",
            "parameters that were made inside torch.inference_mode()",
            "Build or load the model outside of it.",
        )


@dataclass(eq=False)
class GradedCalls(Calls):
    """A receiver that keeps calls, and the gradients that backward passes make there.

    Attributes:
        gradients: The gradient of each call, by its place in ``found``.

    """

    gradients: dict[int, Tensor] = field(default_factory=dict)

    def take(self, attention: nn.Module, call: KernelCall) -> None:
        """Keep the call, and watch what it returned."""
        layer = self.modules.wanted[attention]
        prove_once(attention, call, f"layer {layer}")
        check_differentiable(call, layer)
        if call.place is not None:
            call.place.watch(partial(self.gradients.__setitem__, len(self.found)))
        self.found.append((attention, call.detached().wide()))

    def take_graded(self, number: int) -> Graded:
        """Return a call with its gradient, and keep neither here.

        Raises:
            InvalidInputError: If the gradient is not finite.

        """
        gradient = self.gradients.pop(number)
        if not gradient.isfinite().all():
            raise InvalidInputError(
                "a target whose gradients are finite",
                f"NaN or infinity in layer {self.names[number]}",
                "Look for NaN in images and weights, and for log(0) or 0 / 0 in the target.",
            )
        return Graded(self.found[number][1], gradient)

    @property
    def names(self) -> list[Layer]:
        """The layers in the order of the pass."""
        return [self.modules.wanted[attention] for attention, _ in self.found]

    def differentiate(
        self, total: Tensor, by: Sequence[Tensor], wanted: Sequence[int], *, retain: bool = False
    ) -> None:
        """Let autograd make the gradients of ``total`` at the calls ``wanted``.

        Raises:
            NotRecordedError: If ``total`` does not depend on one of them.

        """
        torch.autograd.grad(total, by, retain_graph=retain, allow_unused=True)
        missing = [self.names[number] for number in wanted if number not in self.gradients]
        if missing and len(missing) == len(wanted) > 1:
            raise NotRecordedError(
                "a target that depends on what the model returned",
                "one that depends on none of its layers",
                "Compute it from the output: lambda output: output[:, 3].",
            )
        if missing:
            raise NotRecordedError(
                "a target that depends on each of the layers",
                f"one that does not depend on {some_of(missing)}",
                "Name the layers that it depends on: layers=[...].",
            )
