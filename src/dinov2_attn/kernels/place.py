"""Where a tensor stands in autograd's graph, and how its gradient is taken there.

A hook on the node that made the tensor is given the gradient of that very result. What is made of
the tensor later does not matter: a view, a transpose, or another value that is written into it. The
hook is part of the graph, and ends with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Rearrange = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Place:
    """One result of one node of autograd's graph.

    Attributes:
        node: The node.
        number: Which of its results.
        heads_first: Makes the result, and so its gradient, ``(B, heads, …, …)``.

    """

    node: Any
    number: int
    heads_first: Rearrange

    def watch(self, take: Callable[[Tensor], None]) -> None:
        """Call ``take`` with the gradient in each backward pass that makes one."""
        number, heads_first = self.number, self.heads_first

        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[number]
            if gradient is not None:
                take(heads_first(gradient.detach()))

        self.node.register_prehook(hook)


def place_of(tensor: Tensor, heads_first: Rearrange) -> Place | None:
    """Return the place of ``tensor`` as it is now, None if no graph leads to it."""
    node = tensor.grad_fn
    return None if node is None else Place(node, tensor.output_nr, heads_first)
