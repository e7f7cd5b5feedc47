"""The processes that extract together, as torchrun starts them; or one alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from dinov2_attn.errors import Dinov2AttnError

T = TypeVar("T")

# A process that is done waits for the slowest, which may take days.
PATIENCE = timedelta(days=365)


@dataclass(frozen=True)
class Ranks:
    """The place of this process, ``rank``, among ``world``."""

    rank: int
    world: int

    def on_rank_zero(self, act: Callable[[], T]) -> T:
        """Let the first process act; return to all what it returned, or raise what it raised."""
        box: list[Any] = [_outcome(act)] if self.rank == 0 else [None]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        result: T = _opened(box[0])
        return result

    def on_each(self, act: Callable[[], T]) -> list[T]:
        """Let each process act; return what all returned, or raise what the first raised.

        None leaves before the others are done: who has failed would leave them waiting.
        """
        outcomes: list[Any] = [_outcome(act)]
        if self.world > 1:
            box, outcomes = outcomes[0], [None] * self.world
            dist.all_gather_object(outcomes, box)
        return [_opened(outcome) for outcome in outcomes]


def ranks() -> Ranks:
    """Join the processes that torchrun started, if it did, or a group that is there already.

    The group is left to the end of the process: in torch 2.0 gloo hangs, more often than not,
    where three processes take one down.
    """
    if not dist.is_available():
        return Ranks(0, 1)
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
            return Ranks(0, 1)
        # Gloo: nothing but a few words is exchanged.
        dist.init_process_group("gloo", timeout=PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size())


def _outcome(act: Callable[[], T]) -> tuple[T | None, Dinov2AttnError | None]:
    try:
        return act(), None
    except Dinov2AttnError as error:
        return None, error


def _opened(outcome: Any) -> Any:
    result, error = outcome
    if error is not None:
        raise error
    return result
