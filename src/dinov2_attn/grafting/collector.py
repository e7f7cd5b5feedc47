"""Taking the weights of some attention modules from one pass, to its end or not."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from dinov2_attn._compat import is_transformed
from dinov2_attn.backbone.structure import attention_modules, name_of
from dinov2_attn.errors import NotRecordedError
from dinov2_attn.grafting.channel import Receiver, prove_once, recording, unrecorded
from dinov2_attn.kernels.call import KernelCall
from dinov2_attn.kernels.capture import Change, StopPassError, check_calls
from dinov2_attn.kernels.link import link_of


class Collector(Receiver):
    """A receiver that keeps the weights of some modules, in the order in which they run.

    Args:
        modules: The attention modules.
        last: The number of kernel calls after which the pass stops, or None to run it to its end.
        links: Whether autograd is to find the weights behind what the kernel returned.
        selection: ``queries`` and ``heads``.

    Attributes:
        weights: The weights of each call.
        called: The modules that have called their kernel.

    """

    def __init__(
        self,
        modules: Collection[nn.Module],
        last: int | None = None,
        *,
        links: bool = False,
        **selection: Any,
    ) -> None:
        self._attentions = modules
        self._last = last
        self._selection = selection
        # Rows alone or a mean over heads are not what the output is made of.
        self._links = links and not any(value is not None for value in selection.values())
        self.weights: list[Any] = []
        self.called: set[nn.Module] = set()

    @property
    def stops(self) -> bool:
        """Whether the next call is the last one."""
        return self._last is not None and len(self.weights) + 1 == self._last

    def wants(self, attention: nn.Module) -> bool:
        """Return whether ``attention`` is one of the modules."""
        return attention in self._attentions

    def take(self, attention: nn.Module, call: KernelCall) -> Change | None:
        """Keep the weights."""
        self.called.add(attention)
        prove_once(attention, call, name_of(type(attention)))
        weights = call.weights(**self._selection)
        self.weights.append(weights)
        return link_of(call, weights) if self._links else None


# Attention modules that were seen to call their kernel once in a whole pass.
_CALLED_ONCE: WeakSet[nn.Module] = WeakSet()


def collect(
    run: Callable[[], object], modules: Collection[nn.Module], last: int, **selection: Any
) -> list[Any]:
    """Run until ``modules`` have called ``last`` kernels, and return their weights in order.

    The first pass of a module runs to its end. So a module that calls its kernel twice is found,
    and the output of the kernel is there to prove its weights.

    Raises:
        NotRecordedError: If the pass becomes a graph.

    """
    if is_transformed():
        raise _in_a_graph(modules)
    known = all(module in _CALLED_ONCE for module in modules)
    collector = Collector(modules, last if known else None, **selection)
    # A pass that ends early may not come to the line that switches grad mode on again.
    grad = torch.set_grad_enabled(torch.is_grad_enabled())
    with unrecorded(), recording(collector, modules), grad, suppress(StopPassError):
        run()
    if len(collector.weights) == last == len(collector.called) == len(modules):
        _CALLED_ONCE.update(modules)
    return collector.weights


def _in_a_graph(modules: Collection[nn.Module]) -> NotRecordedError:
    names = ", ".join(sorted({name_of(type(module)) for module in modules}))
    return NotRecordedError(
        "an eager pass of an attention whose weights are taken at its kernel",
        f"{names} inside torch.compile, torch.export or torch.func",
        "Ask the eager model: compiled._orig_mod.get_self_attention(images). "
        "dinov2_attn.status() says why this class goes by its kernel.",
    )


def weights_at_kernel(
    run: Callable[[], object],
    module: nn.Module,
    attentions: Collection[nn.Module] | None = None,
    **selection: Any,
) -> Any:
    """Return the weights of the attention in ``module``, from its kernel's own call.

    Args:
        run: Runs ``module`` once.
        module: An attention module, or one that contains one.
        attentions: The attention module itself, where it is known.
        selection: ``queries`` and ``heads``.

    Raises:
        NotRecordedError: If there was not one call of a kernel.

    """
    if attentions is None:
        attentions = set(attention_modules(module).values())
    found = collect(run, attentions, 1, **selection)
    check_calls(len(found), name_of(type(module)))
    return found[0]
