"""Taking the weights of some attention modules from one pass, to its end or not."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from dinov2_attn.backbone.contract import name_of
from dinov2_attn.grafting.channel import prove_once, unrecorded
from dinov2_attn.grafting.recording import recording
from dinov2_attn.kernels.call import KernelCall
from dinov2_attn.kernels.capture import StopPassError, check_calls


class Collector:
    """A receiver that keeps the weights of some modules, in the order in which they run.

    Args:
        modules: The attention modules.
        last: The number of kernel calls after which the pass stops, or None to run it to its end.
        selection: ``queries`` and ``heads``.

    """

    def __init__(
        self, modules: Collection[nn.Module], last: int | None = None, **selection: Any
    ) -> None:
        self._attentions = modules
        self._last = last
        self._selection = selection
        self.weights: list[Any] = []

    @property
    def stops(self) -> bool:
        """Whether the next call is the last one."""
        return self._last is not None and len(self.weights) + 1 == self._last

    def begin(self, entrance: nn.Module, images: Tensor) -> None:
        """Do nothing."""

    def left(self, module: nn.Module) -> None:
        """Do nothing."""

    def wants(self, attention: nn.Module) -> bool:
        """Return whether ``attention`` is one of the modules."""
        return attention in self._attentions

    def take(self, attention: nn.Module, call: KernelCall) -> None:
        """Keep the weights."""
        prove_once(attention, call, name_of(type(attention)))
        self.weights.append(call.weights(**self._selection))


def collect(
    run: Callable[[], object], modules: Collection[nn.Module], last: int, **selection: Any
) -> list[Any]:
    """Run until ``modules`` have called ``last`` kernels, and return their weights in order."""
    collector = Collector(modules, last, **selection)
    with unrecorded(), recording(collector, modules), suppress(StopPassError):
        run()
    return collector.weights


def weights_at_kernel(
    run: Callable[[], object],
    module: nn.Module,
    attentions: Collection[nn.Module],
    calls: int | None = None,
    **selection: Any,
) -> Any:
    """Return the weights of the one attention in ``module``, from its kernel's own call.

    Args:
        run: Runs ``module``.
        module: An attention module, or one that contains one.
        attentions: The attention module itself.
        calls: The number of tensors of a list, each of which has a call. None for a tensor.
        selection: ``queries`` and ``heads``.

    """
    found = collect(run, attentions, calls or 1, **selection)
    if calls is None or (len(found) == 1 and isinstance(found[0], list)):
        check_calls(len(found), name_of(type(module)))
        return found[0]
    return found
