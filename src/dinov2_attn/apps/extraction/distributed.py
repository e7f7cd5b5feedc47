"""The processes that share an extraction, as torchrun starts them, or a single one."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from dinov2_attn._compat import CAN_DESTROY_GLOO
from dinov2_attn.apps.extraction.processes import check_torchrun
from dinov2_attn.errors import Dinov2AttnError

T = TypeVar("T")

# A process that is done waits for the slowest one, which may take days.
PATIENCE = timedelta(days=365)


@dataclass(frozen=True)
class Ranks:
    """The number of this process, ``rank``, among ``world`` processes."""

    rank: int
    world: int

    def on_rank_zero(self, act: Callable[[], T]) -> T:
        """Run ``act`` in the first process; return its result, or raise its error, in all."""
        box: list[Any] = [_outcome(act)] if self.rank == 0 else [None]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        result: T = _opened(box[0])
        return result

    def on_each(self, act: Callable[[], T]) -> list[T]:
        """Run ``act`` in each process; return all results, or raise the first error, in all.

        Every process waits for the others: one that left early would block them.
        """
        outcomes: list[Any] = [_outcome(act)]
        if self.world > 1:
            box, outcomes = outcomes[0], [None] * self.world
            dist.all_gather_object(outcomes, box)
        return [_opened(outcome) for outcome in outcomes]


def ranks() -> Ranks:
    """Return the processes that torchrun started, or those of the existing process group.

    A group that is made here exists until the process ends. It is destroyed then: otherwise a
    thread of gloo's sometimes aborts the process after its work.

    Raises:
        InvalidInputError: If torchrun has ended.

    """
    if not dist.is_available():
        return Ranks(0, 1)
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
            return Ranks(0, 1)
        check_torchrun()
        # Gloo is enough: only a few objects are exchanged.
        dist.init_process_group("gloo", timeout=PATIENCE)
        if CAN_DESTROY_GLOO:
            atexit.register(_destroy_group)
    return Ranks(dist.get_rank(), dist.get_world_size())


def _destroy_group() -> None:
    if dist.is_initialized():  # the user may have destroyed it
        dist.destroy_process_group()


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
