"""The cost of attention, compared with upstream's forward and with other libraries.

Ratios of medians, measured in one run on one machine, interleaved in random order::

    python benchmarks/cost.py [--quick] [--quote] [--repo CHECKOUT] [--out FOLDER]

writes ``cost.md``, ``cost.json`` and ``cost.png``. Whole models run in a loop over ten images, in a
process of their own whose heap other calls have used. ``--quote`` copies the rows into
``docs/costs.md``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: the profiler is only listened to
sys.modules["xformers"] = None  # type: ignore[assignment]  # peers have no use for it

import torch
from measure import loop, machine, peak_bytes, ratios
from peers import BASE, SMALL, Size, peers, textbook_rollout, two_steps, upstream

import dinov2_attn
from dinov2_attn.apps.weights.source import obtain
from dinov2_attn.backbone import projection
from dinov2_attn.kernels import call as kernel_calls
from dinov2_attn.kernels import edited
from dinov2_attn.kernels.call import FusedCall
from dinov2_attn.maps.rollout import Layer
from dinov2_attn.math.attention import attention_weights

Call = Callable[[], object]
ImageCall = Callable[[torch.Tensor], object]
MEBI = 2**20


@dataclass(frozen=True)
class Row:
    """One line: what was measured, of which model and image, and what is to be reached."""

    what: str
    model: str
    image: int
    value: float
    unit: str
    reach: float | None = None
    system: float | None = None
    faults: float | None = None
    inside: float | None = None

    @property
    def beside(self) -> str:
        """What stands beside a ratio of the loop."""
        if self.system is None or self.faults is None:
            return ""
        inside = f"{self.inside:.2f} inside, " if self.inside else ""
        return f"{inside}{self.system:.2f} s system, {self.faults:.0f} faults"

    @property
    def verdict(self) -> str:
        if self.reach is None:
            return ""
        return f"≤ {self.reach:g}" if self.value <= self.reach else f"MISSED: ≤ {self.reach:g}"


# Reached where stated: ViT-S/14 on a CPU with two threads, by the pixels of its images.
REACH = {
    224: {
        "every block, CLS row, record": 1.03,
        'every block, full, record, features="from_weights"': 1.06,
    },
    518: {
        "grafted, not asked": 1.01,
        "last block, CLS row": 0.93,
        "last block, full": 0.96,
        "every block, CLS row, record": 1.02,
        "every block, full, record, every matrix kept": 1.35,
        "every block, full, record, streamed to the head mean": 1.35,
        'every block, full, record, heads="mean"': 1.28,
        'every block, full, record, features="from_weights"': 1.15,
        "every block, entropy and distance, record": 1.9,
    },
}


_MATRICES = (
    "products and softmaxes alone, which nobody keeps, take what the table says in the same run; "
    "the rest is memory: every layer's 45 MB are written once and, by reduce, read again"
)
# Why a number is out of reach, where it is missed.
REASONS = {
    "last block, full": "the last matrix itself; it lies within the noise of this machine",
    "every block, CLS row, record": (
        "the arithmetic takes what is inside; the rest is Python for each layer: entering a "
        "recording takes 0.4 ms, and a layer 0.3 ms where a pass has left nothing of it in the "
        "cache, of a pass of 50 ms at 224 pixels"
    ),
    "every block, full, record, every matrix kept": _MATRICES,
    "every block, full, record, streamed to the head mean": _MATRICES,
    'every block, full, record, heads="mean"': _MATRICES,
    'every block, full, record, features="from_weights"': (
        "the fused kernel, which is left out, takes less than the two products and the softmax in "
        "its place: at 224 pixels 0.83 ms a layer on one thread against 0.96 in the barest form"
    ),
    'heads="mean", one layer': (
        "the mean is added up in memory that a result keeps, that of the floor in the cache"
    ),
}
# Each with its image and the number of rounds.
FULL = ((SMALL, 224, 9), (SMALL, 518, 5), (BASE, 518, 2), (SMALL, 952, 1))


def ours(model: Any) -> dict[str, ImageCall]:
    """Return what is asked of a grafted model."""

    def record(images: torch.Tensor, **selection: Any) -> object:
        with dinov2_attn.record(model, **selection) as maps:
            model(images)
        return maps

    head_mean = partial(record, reduce=lambda layer, weights: weights.mean(1))
    return {
        "grafted, not asked": model,
        "last block, CLS row": partial(model.get_last_self_attention, queries="cls"),
        "last block, full": model.get_last_self_attention,
        "every block, CLS row, record": partial(record, queries="cls"),
        "every block, CLS row, record, proved in every pass": partial(
            record, queries="cls", check="every"
        ),
        "every block, CLS row, return_attention=True": partial(
            model, return_attention=True, queries="cls"
        ),
        "every block, full, record, every matrix kept": record,
        "every block, full, record, streamed to the head mean": head_mean,
        'every block, full, record, heads="mean"': partial(record, heads="mean"),
        'every block, full, record, features="from_weights"': partial(
            record, features="from_weights"
        ),
        "every block, full, record, dtype=bfloat16": partial(record, dtype=torch.bfloat16),
        "every block, entropy and distance, record": partial(
            record, statistics=("entropy", "distance"), queries=[]
        ),
    }


class Inside:
    """The seconds that were spent in computing weights, beside the model's own code."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for module in (kernel_calls, projection, edited):
            for name in ("attention_weights", "weights_and_output"):
                if hasattr(module, name):
                    setattr(module, name, self._timed(getattr(module, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def bound(size: Size, image: int) -> Call:
    """Return what every full matrix takes at least: product and softmax, kept nowhere.

    A head at a time, in memory that exists and stays in the cache; the features' own kernel,
    which must not change, does the same work once more.
    """
    length = 1 + size.registers + (image // size.patch) ** 2
    query, key = torch.randn(2, size.heads, length, size.dim // size.heads, device=DEVICE)
    scores = torch.empty(length, length, device=DEVICE)

    def alone() -> None:
        for head in [*range(size.heads)] * size.depth:
            torch.mm(query[head], key[head].t(), out=scores)
            torch.softmax(scores, -1, out=scores)

    return alone


def against_upstream(size: Size, image: int, rounds: int, *, with_peers: bool) -> list[Row]:
    """Measure a whole model in a loop: every call as a ratio to upstream's own forward."""
    model = upstream(size, image).to(DEVICE)
    images = [torch.randn(1, 3, image, image).to(DEVICE) for _ in range(10)]
    calls, alone = ours(model), bound(size, image)
    calls["every block, full: products and softmaxes alone, kept nowhere"] = lambda _: alone()
    if with_peers:
        calls |= peers(size, images[0])
    for _ in range(2):  # as other calls of a user's process use the heap
        dinov2_attn.rollout(model, images[0])
        calls["every block, full, record, streamed to the head mean"](images[1])
    inside = Inside()
    found = loop(
        model,
        calls,
        images,
        rounds=rounds,
        before=_grafted_or_not,
        inside=lambda: inside.seconds,
    )
    reach = REACH.get(image, {}) if size == SMALL and DEVICE == "cpu" else {}
    unit = "× upstream's forward"
    return [
        Row(
            what,
            size.arch,
            image,
            one.ratio,
            unit,
            reach.get(what),
            one.system,
            one.faults,
            one.inside,
        )
        for what, one in found.items()
    ]


def in_fresh_process(arguments: argparse.Namespace, *what: Any) -> list[Row]:
    """Return the rows of ``against_upstream(*what)``, measured in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(_in_this_process, arguments.repo, *what).result()


def _in_this_process(repo: str | None, *what: Any) -> list[Row]:
    _prepare(repo)
    *given, with_peers = what
    with torch.no_grad():
        return against_upstream(*given, with_peers=with_peers)


def _prepare(repo: str | None) -> None:
    warnings.simplefilter("ignore")
    print(obtain(repo), file=sys.stderr)
    dinov2_attn.install()


def mean_over_floor(size: Size, image: int, rounds: int) -> list[Row]:
    """Measure the mean over heads against its floor: product, softmax and mean in the cache."""
    length = 1 + size.registers + (image // size.patch) ** 2
    query, key = torch.randn(2, 1, size.heads, length, size.dim // size.heads, device=DEVICE)
    lines, threads = 128, torch.get_num_threads()
    scores = torch.empty(2, lines * threads, length, device=DEVICE)
    columns = key[0].transpose(1, 2).contiguous()

    def floor() -> None:
        for start in range(0, length, lines * threads):
            rows = query[0, :, start : start + lines * threads]
            tile, mean = scores[:, : rows.shape[1]]
            for head in range(size.heads):
                torch.mm(rows[head], columns[head], out=tile)
                torch.softmax(tile, -1, out=tile)
                mean.add_(tile, alpha=1 / size.heads)

    def own() -> object:
        return attention_weights(query, key, query.shape[-1] ** -0.5, heads="mean")

    calls: dict[str, Call] = {"own": own}
    found = ratios(floor, calls, rounds=rounds)["own"]
    reach = 1.08 if DEVICE == "cpu" else None
    return [Row('heads="mean", one layer', size.arch, image, found, "× its floor", reach)]


def one_matrix(size: Size, image: int, rounds: int) -> list[Row]:
    """Measure one layer's matrix against the bare product that allocates its result.

    Run this first: later the allocator has memory whose pages are already mapped.
    """
    length = 1 + size.registers + (image // size.patch) ** 2
    query, key = torch.randn(2, 1, size.heads, length, size.dim // size.heads, device=DEVICE)
    calls = {
        "one full matrix": lambda: attention_weights(query, key, query.shape[-1] ** -0.5),
        "one full matrix, plain two-step": lambda: two_steps(query, key),
    }
    found = ratios(lambda: query @ key.transpose(-2, -1), calls, rounds=4 * rounds)
    reach = {"one full matrix": 0.90} if DEVICE == "cpu" else {}
    return [
        Row(what, size.arch, image, value, "× bare q @ kᵀ", reach.get(what))
        for what, value in found.items()
    ]


def memory(size: Size, image: int) -> list[Row]:
    """Measure peaks beyond that of upstream's own forward."""
    model, images = upstream(size, image).to(DEVICE), torch.randn(1, 3, image, image).to(DEVICE)
    length = 1 + getattr(model, "num_register_tokens", 0) + (image // size.patch) ** 2
    matrix = size.heads * length**2 * 4
    dinov2_attn.release_memory()  # what is kept is not allocated, and so not counted
    forward = peak_bytes(lambda: model(images))
    calls = ours(model)

    def cls_of_mean() -> object:
        keep = lambda layer, weights: weights[:, :, 0].mean(1)  # noqa: E731
        with dinov2_attn.record(model, reduce=keep) as maps:
            model(images)
        return maps

    own = peak_bytes(lambda: calls["every block, CLS row, record"](images)) - forward
    asked = calls["every block, entropy and distance, record"]
    measured = peak_bytes(lambda: asked(images)) - forward
    dinov2_attn.release_memory()
    streamed = peak_bytes(cls_of_mean) - forward
    what = "every block, full, record, reduced to the head mean of the CLS row"
    return [
        Row("upstream's forward, peak", size.arch, image, forward / MEBI, "MiB"),
        Row("every block, CLS row, record, extra", size.arch, image, own / MEBI, "MiB", 8),
        Row(
            "every block, entropy and distance, record, extra",
            *(size.arch, image, measured / MEBI, "MiB", 32),
        ),
        Row(what, size.arch, image, streamed / matrix, "× one matrix, extra", 1.3),
    ]


def rollouts(size: Size, image: int, rounds: int) -> list[Row]:
    """Measure rollout of CLS: of a whole call the memory, and the time from images on."""
    model, images = upstream(size, image).to(DEVICE), torch.randn(1, 3, image, image).to(DEVICE)
    own, rows = lambda: dinov2_attn.rollout(model, images), []
    if image <= 518:
        textbook = lambda: textbook_rollout(model.get_self_attention(images))  # noqa: E731
        found = ratios(textbook, {"own": own}, rounds=rounds)["own"]
        what = "rollout of CLS from images on, a forward pass in both"
        rows = [Row(what, size.arch, image, found, "× textbook")]
    dinov2_attn.release_memory()
    extra = (peak_bytes(own) - peak_bytes(lambda: model(images))) / MEBI
    return [*rows, Row("rollout of CLS, extra", size.arch, image, extra, "MiB", 64)]


def rollout_itself(size: Size, image: int, rounds: int) -> list[Row]:
    """Measure rollout of CLS from the queries and keys of all layers on."""
    length = 1 + size.registers + (image // size.patch) ** 2
    shape = (size.depth, 2, 1, size.heads, length, size.dim // size.heads)
    layers, positions = torch.randn(shape, device=DEVICE), torch.arange(length, device=DEVICE)

    def own() -> object:
        shares = torch.eye(length, device=DEVICE)[None, :1]
        for query, key in layers.flip(0):
            call = FusedCall("", query, key, key, shape[-1] ** -0.5)
            shares = Layer("mean", 0.5).push(shares, positions, call)
        return shares

    textbook = lambda: textbook_rollout([two_steps(query, key) for query, key in layers])  # noqa: E731
    found = ratios(textbook, {"own": own}, rounds=rounds)["own"]
    what = "rollout of CLS, from queries and keys on"
    return [Row(what, size.arch, image, found, "× textbook product", 0.25)]


def _grafted_or_not(name: str | None) -> None:
    if name is None:
        dinov2_attn.uninstall()
    else:
        dinov2_attn.install()


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown, with the reason for what is missed."""
    lines = [HEAD, "|---|---|---|---|---|"]
    lines += [
        f"{_key(row)} {row.value:.2f} {row.unit} | {row.verdict} | {row.beside} |" for row in rows
    ]
    rounds = ", ".join(f"{size.arch} at {image}: {count}" for size, image, count in FULL)
    lines += ["", f"Medians of ratios, interleaved; {machine()}, batch 1, float32."]
    lines += [
        "Ratios to upstream's forward are those of a loop over ten images, in a fresh process "
        "whose heap other calls have used. Beside: the time inside the weights' own code as a "
        "multiple of that forward, and for each image seconds in the operating system and page "
        "faults."
    ]
    lines += [f"Rounds of a full run against upstream's forward: {rounds}."]
    missed = [row.what for row in rows if row.verdict.startswith("MISSED") and row.what in REASONS]
    return "\n".join([*lines, *(f"\nMissed, {what}: {REASONS[what]}." for what in missed)])


HEAD = "| what | model, image | measured | reach | beside |"


def _key(row: Row) -> str:
    return f"| {row.what} | {row.model}, {row.image} |"


def _cells(line: str) -> tuple[str, ...]:
    return tuple(line.split("|")[1:3])


def quote(rows: list[Row], page: Path) -> None:
    """Copy the rows that ``page`` quotes from the table."""
    new = {_cells(line): line for line in table(rows).splitlines() if line.startswith("| ")}
    lines = page.read_text("utf-8").splitlines()
    quoted = [new.get(_cells(line), line) if line.startswith("| ") else line for line in lines]
    page.write_text("\n".join(quoted) + "\n", "utf-8")


def plot(rows: list[Row], file: Path) -> None:
    """Draw the ratios to upstream's forward."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.unit.endswith("forward")]
    figure, axes = pyplot.subplots(figsize=(9, 0.3 * len(shown) + 1.2), layout="constrained")
    names = [f"{row.what} ({row.model}, {row.image})" for row in shown]
    peer = ["timm" in name or "transformers" in name for name in names]
    colours = ["#999999" if p else "#3b6fb6" for p in peer]
    axes.barh(names, [row.value for row in shown], color=colours)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("time, as a multiple of upstream's own forward")
    axes.set_title(machine(), fontsize=9)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure, print, and write table, JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under two minutes on two cores")
    parser.add_argument("--quote", action="store_true", help="copy rows into docs/costs.md")
    parser.add_argument("--repo", metavar="PATH", help="a checkout of facebookresearch/dinov2")
    parser.add_argument("--out", metavar="FOLDER", default="benchmarks/results", type=Path)
    arguments = parser.parse_args()
    _prepare(arguments.repo)
    with torch.no_grad():
        rows = _quick(arguments) if arguments.quick else _all(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    (arguments.out / "cost.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))
    (arguments.out / "cost.md").write_text(table(rows) + "\n")
    plot(rows, arguments.out / "cost.png")
    print(table(rows))
    if arguments.quote:
        quote(rows, Path(__file__).parents[1] / "docs" / "costs.md")


def _quick(arguments: argparse.Namespace) -> list[Row]:
    return [
        *one_matrix(SMALL, 518, 5),
        *in_fresh_process(arguments, SMALL, 518, 2, True),
        *mean_over_floor(SMALL, 518, 10),
        *rollout_itself(SMALL, 518, 3),
        *rollouts(SMALL, 518, 1),
    ]


def _all(arguments: argparse.Namespace) -> list[Row]:
    rows = one_matrix(SMALL, 518, 15)
    for size, image, rounds in FULL:
        rows += in_fresh_process(arguments, size, image, rounds, image <= 518)
    rows += mean_over_floor(SMALL, 518, 30)
    rows += memory(SMALL, 952)
    rows += rollout_itself(SMALL, 518, 7)
    return rows + rollouts(SMALL, 518, 5) + rollouts(SMALL, 952, 1)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if __name__ == "__main__":
    main()
