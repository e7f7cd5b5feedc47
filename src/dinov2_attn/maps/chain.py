"""The blocks of a model that runs its own pass, and the norms of the tokens that they return."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_attn.backbone.structure import name_of
from dinov2_attn.backbone.watching import Before, watching
from dinov2_attn.errors import IncompatibleUpstreamError


def blocks_around(model: nn.Module, attentions: Iterable[nn.Module]) -> list[nn.Module]:
    """Return for each of ``attentions`` the entry of a list of modules that contains it alone.

    That is ``encoder.layer.3`` for ``encoder.layer.3.attention``.

    Raises:
        IncompatibleUpstreamError: If there is no such entry.

    """
    paths = {module: path for path, module in model.named_modules()}
    wanted = [paths[attention] for attention in attentions]
    found = [next(_alone(model, path, wanted), None) for path in wanted]
    if any(block is None for block in found) or len(set(found)) < len(found):
        raise _no_chain(model, "attention modules that are in no such list")
    return [block for block in found if block is not None]


def _alone(model: nn.Module, path: str, wanted: Sequence[str]) -> Iterator[nn.Module]:
    """Yield the entries of lists on the way to ``path`` that lead to no other, outermost first."""
    parts = path.split(".")
    for i in range(1, len(parts)):
        outer, inner = ".".join(parts[: i - 1]), ".".join(parts[:i])
        others = [other for other in wanted if f"{other}.".startswith(f"{inner}.")]
        is_list = isinstance(model.get_submodule(outer), nn.ModuleList | nn.Sequential)
        if is_list and len(others) == 1:
            yield model.get_submodule(inner)


@dataclass
class Norms:
    """The norms of the tokens after each block of a pass.

    Attributes:
        after: ``(B, N)`` for each block that has run, float32 at least.

    """

    model: nn.Module
    after: list[Tensor] = field(default_factory=list)
    _last: Tensor | None = None

    def enter(self, number: int, given: Iterable[object]) -> None:
        """Check that block ``number`` is given what the one before returned."""
        if number == 0:
            self.after, self._last = [], None
        elif number != len(self.after) or not any(map(self._is_last, given)):
            raise _no_chain(self.model, f"another input of block {number}")

    def _is_last(self, given: object) -> bool:
        """Return whether ``given`` is the last tokens, or a list of them alone (DINOv3)."""
        one = given[0] if isinstance(given, list) and len(given) == 1 else given
        return one is self._last

    def leave(self, number: int, output: object) -> None:
        """Take the norms of what block ``number`` returned, its tokens or a tuple with them."""
        tokens = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            raise _no_chain(self.model, f"{type(tokens).__name__} from block {number}")
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        self._last = tokens
        self.after.append(torch.linalg.vector_norm(tokens, dim=-1, dtype=dtype))


@contextmanager
def norms_of(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[Norms]:
    """Collect the norms of the tokens after ``blocks`` in a pass of this thread.

    Raises:
        IncompatibleUpstreamError: If a block is given something else than what the one before
            returned, so that its output may not be the tokens.

    """
    norms = Norms(model)
    with ExitStack() as stack:
        for i, block in enumerate(blocks):
            enter, leave = partial(_enter, norms, i), partial(norms.leave, i)
            if block._forward_pre_hooks:  # which may change what the block is given
                hook = partial(_enter_behind, enter, get_ident())
                handle = block.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
                stack.enter_context(watching(block, after=leave))
            else:
                stack.enter_context(watching(block, before=enter, after=leave))
        yield norms


def _enter_behind(
    enter: Before, thread: int, _: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    if get_ident() == thread:
        enter(args, kwargs)


def _enter(norms: Norms, number: int, args: Any, kwargs: dict[str, Any]) -> None:
    norms.enter(number, (*args, *kwargs.values()))


def _no_chain(model: nn.Module, found: str) -> IncompatibleUpstreamError:
    return IncompatibleUpstreamError(
        "a list of blocks, each of which is given the tokens that the one before returned",
        f"{found} in {name_of(type(model))}",
        "Norms of its tokens cannot be told apart from others. Attention alone: "
        "attention_maps(model, images).",
    )
