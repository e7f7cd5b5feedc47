"""Time and memory of calls that are compared with each other: interleaved, as ratios."""

from __future__ import annotations

import itertools
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]
ImageCall = Callable[[torch.Tensor], object]


def ratios(
    base: Call,
    calls: dict[str, Call],
    *,
    rounds: int,
    before: Callable[[str | None], None] = lambda name: None,
) -> dict[str, float]:
    """Return for each call the median of its time in terms of that of ``base``.

    In every round all calls run, in random order, each right after ``base``: machines that
    others use too change their speed from second to second. ``before(name)``, of ``base`` with
    ``None``, and a first, untimed run prepare each: what was left in caches and in the
    allocator's hands is none of its cost.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for name in _shuffled(list(calls), rounds):
        seconds = []
        for called, call in ((None, base), (name, calls[name])):
            before(called)
            call()
            seconds.append(_seconds(call))
        found[name].append(seconds[1] / seconds[0])
    return {name: statistics.median(values) for name, values in found.items()}


@dataclass(frozen=True)
class Looped:
    """What one image of a loop took: medians.

    Attributes:
        ratio: The time in terms of that of the base, right before on the same image.
        system: Seconds in the operating system.
        faults: Page faults.
        inside: What ``inside`` counted, in terms of the time of the base.

    """

    ratio: float
    system: float
    faults: float
    inside: float


def loop(
    base: ImageCall,
    calls: dict[str, ImageCall],
    images: Sequence[torch.Tensor],
    *,
    rounds: int,
    before: Callable[[str | None], None] = lambda name: None,
    inside: Callable[[], float] = lambda: 0.0,
) -> dict[str, Looped]:
    """Return what calls take in a loop over ``images``, as a user runs them.

    In every round all calls run, in random order: each on two images one after the other, of which
    the second is timed, right after ``base`` on the same image. The results of each call are let go
    before the next. ``inside()`` is read around each call.
    """
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    endless = itertools.cycle(images)
    for name in _shuffled(list(calls), rounds):
        for image in itertools.islice(endless, 2):
            before(None)
            seconds = _seconds(partial(base, image))
            before(name)
            counted, start = inside(), resource.getrusage(resource.RUSAGE_SELF)
            own = _seconds(partial(calls[name], image))
            end = resource.getrusage(resource.RUSAGE_SELF)
        counts = (end.ru_stime - start.ru_stime, end.ru_minflt - start.ru_minflt)
        found[name].append((own / seconds, *counts, (inside() - counted) / seconds))
    return {
        name: Looped(*map(statistics.median, zip(*all_, strict=True)))
        for name, all_ in found.items()
    }


def medians(calls: dict[str, Call], *, rounds: int) -> dict[str, float]:
    """Return the median seconds of each call; in every round all of them run, in random order."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in _shuffled(list(calls), rounds):
        calls[name]()
        seconds[name].append(_seconds(calls[name]))
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_bytes(call: Call) -> int:
    """Return the most that ``call`` held at a time beyond what was there before.

    On the CPU by PyTorch's own allocation events: other processes and the operating system's
    habits stay out of it. With CUDA, its allocator counts.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return peak


def machine() -> str:
    """Describe what the figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {threads} threads, {device}, torch {torch.__version__}"


def _shuffled(names: list[str], rounds: int) -> Iterator[str]:
    """Yield all ``names`` in each round, in another order each time, alike in every run."""
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(names)
        yield from names


def _seconds(call: Call) -> float:
    _synchronise()
    start = time.perf_counter()
    result = call()
    _synchronise()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
