"""Gradients of a target by the weights of a recorded pass, which a backward pass makes later.

The kernel never makes the weights, and needs not to: with the gradient at its output,
``d weights = d output @ valueᵀ``. A hook in autograd's graph computes that when a backward pass
comes by. Nothing in the pass changes, and nothing is set on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from dinov2_attn._compat import backward_pass
from dinov2_attn.errors import InvalidInputError, NotRecordedError
from dinov2_attn.kernels.call import ExplicitCall, KernelCall
from dinov2_attn.kernels.place import Place
from dinov2_attn.typing import Heads, Layer, Queries

Change = Callable[[Any], Any]


@dataclass(eq=False)
class Slot:
    """The gradient by the weights of one layer for one batch.

    Attributes:
        value: The gradient, or what ``reduce`` made of it.
        backward: The number of the backward pass that made it, -1 before any.

    """

    value: Any = None
    backward: int = -1


def check_differentiable(call: KernelCall, layer: Layer) -> None:
    """Raise unless a backward pass can say the gradient by the weights of ``call``.

    Raises:
        NotRecordedError: If no graph leads to what the kernel returned.
        InvalidInputError: If the kernel drops weights.

    """
    if call.place is None:
        raise NotRecordedError(
            f"a pass whose output has a gradient by the weights of layer {layer}",
            "one that autograd does not follow there",
            "Leave torch.no_grad() and torch.inference_mode(). If the model is frozen, call "
            "images.requires_grad_() before the pass. For checkpoints say use_reentrant=False.",
        )
    if call.dropout and not isinstance(call, ExplicitCall):
        raise InvalidInputError(
            "weights that the kernel multiplies with the values as they are",
            f"a kernel that drops some of layer {layer} with probability {call.dropout:g}",
            "Call model.eval() first, or set the dropout of the attention to 0.",
        )


def watch(
    place: Place,
    call: KernelCall,
    count: int,
    queries: Queries,
    heads: Heads,
    reduce: Change | None,
) -> list[Slot]:
    """Return a slot for each of ``count`` results, which every backward pass fills.

    Args:
        place: That of what the kernel returned.
        call: What the kernel was given, outside of the graph.
        count: The number of batches in it.
        queries: The rows.
        heads: None for each head, ``"mean"`` for the mean of their gradients.
        reduce: Makes of the gradient what is kept.

    """
    slots = [Slot() for _ in range(count)]

    def take(gradient: Tensor) -> None:
        found = call.gradients(gradient, queries, heads)
        for slot, one in zip(slots, found if isinstance(found, list) else [found], strict=True):
            slot.value = one if reduce is None else reduce(one)
            slot.backward = backward_pass()

    place.watch(take)
    return slots


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients by the weights of some layers, once a backward pass has made them.

    Attributes:
        slots: The slot of each layer.
        change: What is done to each gradient that is read.

    """

    slots: Mapping[Layer, Slot]
    change: Change | None = None

    @classmethod
    def of(cls, layers: Sequence[Layer], values: Sequence[Any]) -> Gradients:
        """Return gradients that are there already."""
        return cls({layer: Slot(v, 0) for layer, v in zip(layers, values, strict=True)})

    def changed(self, change: Change) -> Gradients:
        """Return the same with ``change`` applied to each, also to those that come later."""
        before = self.change
        return Gradients(self.slots, change if before is None else lambda v: change(before(v)))

    @property
    def are_there(self) -> bool:
        """Whether the last backward pass made the gradients of all layers."""
        return not self._missing()

    def read(self) -> tuple[Any, ...]:
        """Return the gradients that the last backward pass made, in the order of the layers.

        Raises:
            NotRecordedError: If there was no backward pass, or it missed a layer.

        """
        if missing := self._missing():
            self._fail(missing)
        values = [slot.value for slot in self.slots.values()]
        return tuple(values if self.change is None else map(self.change, values))

    def _missing(self) -> list[Layer]:
        last = max((slot.backward for slot in self.slots.values()), default=-1)
        return [i for i, slot in self.slots.items() if slot.backward != last or last < 0]

    def _fail(self, missing: Sequence[Layer]) -> NoReturn:
        if len(missing) == len(self.slots):
            raise NotRecordedError(
                "a backward pass of what the model returned, before gradients are read",
                "none that came by the recorded layers",
                "Call loss.backward(), or torch.autograd.grad(loss, images) for images that "
                "require a gradient. The loss has to depend on the output of the recorded pass.",
            )
        raise NotRecordedError(
            "a backward pass that comes by each recorded layer",
            f"one that missed {', '.join(map(str, missing))}",
            "Record only the layers that the target depends on, layers=[...], and differentiate "
            "down to the images or to all parameters.",
        )
