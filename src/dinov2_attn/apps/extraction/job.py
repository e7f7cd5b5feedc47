"""One extraction from listing the source to the final index, by one or several processes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import filelock

from dinov2_attn._files import is_no_file
from dinov2_attn.apps.extraction import shards
from dinov2_attn.apps.extraction.bar import Bar
from dinov2_attn.apps.extraction.distributed import Ranks, ranks
from dinov2_attn.apps.extraction.layout import LOCK
from dinov2_attn.apps.extraction.options import Options
from dinov2_attn.apps.extraction.parquet import write_parquet
from dinov2_attn.apps.extraction.passed_over import Sieve, describe
from dinov2_attn.apps.extraction.plan import Plan, plan
from dinov2_attn.apps.extraction.preview import Preview, preview
from dinov2_attn.apps.extraction.processes import ending_with_torchrun
from dinov2_attn.apps.extraction.sources import Source, wanted
from dinov2_attn.apps.extraction.worker import Run, refuse, writing_to
from dinov2_attn.errors import UnwritableOutputError
from dinov2_attn.typing import Model


@dataclass(frozen=True)
class Summary:
    """The result of an extraction.

    Attributes:
        images: The number of images of the source.
        unreadable: The number of images without maps.
        failed: The number of those that were decoded and failed in the model.
        shards: The number of shards of the source.
        seen: The number of images of this run.
        written: The number of shards that this run wrote.
        bytes: The bytes that this run wrote.
        seconds: The duration of this run.
        passed_over: The number of other files in the source, by suffix.

    """

    images: int
    unreadable: int
    failed: int
    shards: int
    seen: int
    written: int
    bytes: int
    seconds: float
    passed_over: dict[str, int] = field(hash=False)

    def __str__(self) -> str:
        before = self.shards - self.written
        shards = f"{self.shards:,} shard{'s' * (self.shards != 1)}"
        parts = [
            f"{self.images:,} images, {self.unreadable:,} of them unreadable{self._failed()}, "
            f"in {shards}",
            f", {before:,} of them there before" * bool(before),
            f"; this run: {self.seen:,} images, {self.bytes / 1e6:,.1f} MB in "
            f"{self.seconds:,.1f} s, {self.seen / max(self.seconds, 1e-9):,.1f} images/s",
            f"; {describe(self.passed_over)}" * bool(self.passed_over),
        ]
        return "".join(parts)

    def _failed(self) -> str:
        whose = "its pass" if self.failed == 1 else "their passes"
        return f" ({self.failed:,} in {whose} through the model)" * bool(self.failed)


@dataclass(frozen=True)
class Job:
    """The arguments of ``extract``, checked."""

    model: Model
    source: Source
    folder: Path
    options: Options
    workers: int
    strict: bool
    retry: bool
    verify: bool
    progress: bool
    name: str | None
    warning: str | None
    parquet: bool = False

    def run(self) -> Summary:
        """Write the missing shards, and the index when all are finished."""
        begun = time.perf_counter()
        with ending_with_torchrun(), ExitStack() as held:
            group = ranks()
            made, pending = group.on_rank_zero(lambda: self._begin(held))
            own = pending[group.rank :: group.world]
            bar = self._bar(group, made.count(own))
            run = Run(
                self.model,
                made,
                self.options,
                self.source.decoder(wanted(self.model, self.options)),
                self.folder,
                self.workers,
                self.strict,
                bar,
            )
            written = group.on_each(lambda: run(own))
            stages = group.on_rank_zero(lambda: self._end(made))
        return Summary(
            images=len(made.items),
            unreadable=sum(stages.values()),
            failed=stages["pass"],
            shards=made.shards,
            seen=made.count(pending),
            written=len(pending),
            bytes=sum(written),
            seconds=time.perf_counter() - begun,
            passed_over=made.passed_over,
        )

    def preview(self) -> Preview:
        """Return what ``run`` would do."""
        group = ranks()
        bar = partial(self._bar, group)

        def describe_run() -> Preview:
            made = self._plan()
            with writing_to(self.folder):
                if self.folder.exists():
                    shards.check(self.folder, made)
            done = self._done(made)
            measurer = self.source.measurer(wanted(self.model, self.options))
            rest = (self.folder, done, self.workers, bar)
            return preview(self.model, made, self.options, measurer, *rest)

        return group.on_rank_zero(describe_run)

    def _plan(self) -> Plan:
        sieve = Sieve()
        items = self.source.items(sieve)
        self.source.check(items, wanted(self.model, self.options))
        return plan(
            self.model,
            items,
            self.options,
            self.name,
            self.warning,
            sieve.passed_over,
            self.source.transform,
        )

    def _begin(self, held: ExitStack) -> tuple[Plan, list[int]]:
        """Lock the folder for this run; return the plan and the shards to write."""
        made = self._plan()
        with writing_to(self.folder):
            held.enter_context(_alone(self.folder))
            shards.check(self.folder, made)
            shards.prepare(self.folder, made)
        done = self._done(made)
        if self.strict:
            for line in (line for shard in done for line in shards.refusals(self.folder, shard)):
                refuse(line["path"], line["reason"])
        return made, made.others(done)

    def _done(self, made: Plan) -> list[int]:
        """Return the finished shards, without those to retry."""
        done = shards.finished(self.folder, made, self.verify)
        if self.retry:
            done = [shard for shard in done if not shards.refusals(self.folder, shard)]
        return done

    def _end(self, made: Plan) -> Counter[str]:
        with writing_to(self.folder):
            stages = shards.merge(self.folder, made.shards)
            write_parquet(self.folder, made.about, asked=self.parquet)
            return stages

    def _bar(self, group: Ranks, total: int) -> Bar:
        label = f"process 1 of {group.world}" if group.world > 1 else None
        # A daemon or a program with windows may have no standard error.
        hidden = not self.progress or group.rank > 0 or sys.stderr is None
        return Bar(total=total, unit="image", desc=label, disable=hidden or None)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against other runs; create it if it does not exist.

    The lock is released when the process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    if path.is_symlink() or is_no_file(path):  # it would be emptied
        raise UnwritableOutputError(
            f"a lock of an extraction at {path}",
            "a link, or something that is not a file",
            "Remove it, or name another folder.",
        )
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UnwritableOutputError(
            f"a folder that no other run is writing to at {folder}",
            "one that is locked",
            "Wait for the other run, or name another folder.",
        ) from error
    try:
        yield
    finally:
        lock.release()
