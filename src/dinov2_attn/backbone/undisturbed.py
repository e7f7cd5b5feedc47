"""Running a model in evaluation mode, and leaving it as it was."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_attn._compat import grad_mode_kept, version_of
from dinov2_attn._locks import fork_safe_lock
from dinov2_attn.backbone.watching import watching

_ONE_AT_A_TIME = fork_safe_lock()

# What a pass may add entries to, such as the features that later layers read.
_DICTS = (dict, OrderedDict, defaultdict)
_CONTAINERS = (*_DICTS, list, set, deque, tuple)


@contextmanager
def undisturbed(
    model: nn.Module, device: torch.device, around: nn.Module | None = None
) -> Iterator[None]:
    """Run inside in evaluation mode, without autograd; restore what the run changes in ``model``.

    What ``around`` contains is restored too: a model may collect features of its backbone by hooks.

    That is: training flags, buffers, attributes, entries of dicts, lists and the like that are
    attributes, and the random state of Python, of PyTorch and of ``device``. Parameters are not
    restored: no forward pass changes their values, and FSDP keeps account of its own changes.
    """
    # What one thread restores must not be what another one set for the time of its run.
    with _ONE_AT_A_TIME, grad_mode_kept(), ExitStack() as stack:
        cuda = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.callback(random.setstate, random.getstate())
        stack.enter_context(torch.no_grad())
        for module in (model if around is None else around).modules():
            _restore_at_end(module, stack)
        for module in [m for m in model.modules() if m.training]:
            # Not eval(): a class may have a train() of its own, which does more. Scripted modules
            # do not keep the flag among their attributes.
            stack.callback(setattr, module, "training", True)
            module.training = False
        yield


def _restore_at_end(module: nn.Module, stack: ExitStack) -> None:
    for buffer in module.buffers(recurse=False):
        stack.callback(_restore_buffer, buffer, buffer.clone(), version_of(buffer))
    attributes = {name: v for name, v in vars(module).items() if name != "_parameters"}
    stack.callback(_restore, vars(module), dict(vars(module)))
    waiting, seen = [*attributes.values()], set()
    while waiting:
        value = waiting.pop()
        if type(value) not in _CONTAINERS or id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) in _DICTS:
            stack.callback(_restore, value, dict(value))
            waiting += value.values()
        else:
            if type(value) is not tuple:
                stack.callback(_restore_members, value, [*value])
            waiting += value


def first_input(run: Callable[[], object], module: nn.Module) -> tuple[Tensor | None, bool]:
    """Run until ``module`` is called, and return the first tensor that it is given.

    The run ends there. Pre-hooks of ``module`` itself do not run.

    Returns:
        The tensor, or None if there was none; and whether ``module`` was called.

    """
    inputs: list[Tensor | None] = []
    with watching(module, before=partial(_stop_at, inputs)), suppress(_Reached):
        run()
    return (inputs[0], True) if inputs else (None, False)


class _Reached(BaseException):
    """Ends a run. No ``except Exception`` of a model stops it."""


def _stop_at(inputs: list[Tensor | None], args: Any, kwargs: dict[str, Any]) -> None:
    given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    inputs.append(next(given, None))
    raise _Reached


def _restore_buffer(buffer: Tensor, before: Tensor, version: int | None) -> None:
    if version_of(buffer) != version:
        buffer.copy_(before)


def _restore_members(values: Any, before: list[Any]) -> None:
    now = [*values]
    if len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True)):
        return
    if isinstance(values, list):
        values[:] = before  # at once: another thread may read it
        return
    values.clear()
    add = values.update if isinstance(values, set) else values.extend
    add(before)


def _restore(values: dict[Any, Any], before: dict[Any, Any]) -> None:
    # Entry by entry: another thread may read the dict.
    for name in values.keys() - before.keys():
        del values[name]
    for name, value in before.items():
        if name not in values or values[name] is not value:
            values[name] = value
