"""A model that returns its attention beside its output, in a form that ``torch.export`` traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from dinov2_attn.backbone.structure import name_of
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.kernels.call import KernelCall
from dinov2_attn.kernels.capture import Capture, check_calls
from dinov2_attn.math.selection import Rows
from dinov2_attn.typing import Heads


class WithAttentions(nn.Module):
    """``model`` with the weights of some of its attention modules as further outputs.

    They are those that follow from what each kernel is given, as in ``record``. ``watched`` has
    to be active around each call and each export.

    Args:
        model: Any module with attention inside.
        attentions: The attention modules, in the order of the outputs.
        rows: The positions of the rows that are wanted.
        heads: None for each head, ``"mean"`` for their mean.

    """

    def __init__(
        self, model: nn.Module, attentions: list[nn.Module], rows: Rows, heads: Heads
    ) -> None:
        super().__init__()
        self.model = model
        self._attentions = tuple(attentions)  # a tuple: they are not submodules twice
        self._rows, self._heads = rows, heads
        # Not an attribute of a module: a trace must not find its tensors there afterwards.
        self._taken = _Taken()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the model's output, then the weights of each attention module."""
        self._taken.weights = {}
        output = self.model(images)
        found, self._taken.weights = self._taken.weights, {}
        outputs = [tensor for _, tensor in tensors_of(output)]
        return (*outputs, *(found[module] for module in self._attentions))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Run the attention modules so that their kernel calls are seen."""
        with ExitStack() as stack:
            for module in self._attentions:
                stack.enter_context(_captured(module, self._take(module)))
            yield

    def _take(self, module: nn.Module) -> Callable[[KernelCall], None]:
        def take(call: KernelCall) -> None:
            weights: Any = call.weights(self._rows, self._heads)  # of one tensor, not of a list
            self._taken.weights[module] = weights

        return take


class _Taken:
    """The weights of the pass that runs."""

    def __init__(self) -> None:
        self.weights: dict[nn.Module, Tensor] = {}


@contextmanager
def _captured(module: nn.Module, take: Callable[[KernelCall], None]) -> Iterator[None]:
    """Run the forward of ``module`` under a ``Capture``, until the block ends."""
    original, own = module.forward, vars(module).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        with Capture(module, take) as capture:
            output = original(*args, **kwargs)
        check_calls(capture.calls, name_of(type(module)))
        return output

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def tensors_of(output: object, name: str = "features") -> list[tuple[str, Tensor]]:
    """Return the tensors in what a model returned, each with its name.

    Keys of a dict are names, and places in a tuple are appended: ``features_0``. None is left out.

    Raises:
        InvalidInputError: If there is something that is neither.

    """
    if output is None:
        return []
    if isinstance(output, Tensor):
        return [(name, output)]
    if isinstance(output, Mapping):
        return [pair for key, one in output.items() for pair in tensors_of(one, str(key))]
    if isinstance(output, tuple | list):
        return [pair for i, one in enumerate(output) for pair in tensors_of(one, f"{name}_{i}")]
    raise InvalidInputError(
        "a model that returns tensors, or dicts and tuples of them",
        f"{type(output).__name__} as {name}",
        "Wrap the model in a module whose forward returns the tensors that you need.",
    )
