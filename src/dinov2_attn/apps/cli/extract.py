"""``dinov2-attn extract``: the attention of a whole dataset, in shards with an index."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from argparse import ArgumentTypeError
from glob import has_magic
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from dinov2_attn.apps.cli import early
from dinov2_attn.apps.cli.argtypes import (
    HEADS,
    add_layers,
    add_output,
    add_queries,
    positive,
    whole,
)
from dinov2_attn.apps.cli.filming import add_sampling
from dinov2_attn.apps.cli.image_options import (
    add_image_size,
    check_reading,
    image_size,
    require_libraries,
)
from dinov2_attn.apps.cli.model_options import add_options, load_model
from dinov2_attn.apps.cli.report import say
from dinov2_attn.apps.extraction.processes import check_torchrun, end_with
from dinov2_attn.typing import Statistic

DESCRIPTION = """\
Store the attention maps of every image of SOURCE. The folder OUT gets shards of maps (safetensors),
index.jsonl with one line for each image, and unreadable.jsonl with one line for each image that
cannot be decoded or on which the model fails. A run that was stopped continues where it left off
when it is started again. `torchrun --nproc-per-node K -m dinov2_attn extract …` shares the work
among K processes. The exit status is 1 if images have no maps.
"""

EPILOG = """\
Example: dinov2-attn extract photos -o out --layers 5,11 --queries cls registers --heads mean
"""

READ = "dinov2_attn.AttentionDataset({!r})"

SOURCES = """\
A folder, an uncompressed tar (such as a shard of WebDataset), a glob, or a text file with one path
per line. Images are all files that Pillow can decode, and the frames of videos; other files are
counted by suffix."""


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "extract",
        help="Store the attention of a whole dataset.",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE", help=SOURCES)
    add_output(parser, "OUT", "The folder for the shards and the index.")
    _add_what(parser)
    add_sampling(parser.add_argument_group("videos"))
    add_image_size(parser)
    _add_how(parser)
    add_options(parser)
    parser.set_defaults(run=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is stored")
    add_layers(group, [-1], "the last")
    add_queries(group)
    group.add_argument("--heads", choices=("each", "mean"), default="each", help=HEADS)
    group.add_argument(
        "--format",
        choices=("safetensors", "zarr"),
        default="safetensors",
        help="The files of the maps: safetensors, or zarr arrays, which need `pip install "
        "'dinov2-attn[zarr]'`. Default: safetensors.",
    )
    group.add_argument(
        "--index",
        choices=("jsonl", "parquet"),
        default="jsonl",
        help="Write index.parquet beside index.jsonl. Needs `pip install 'dinov2-attn[parquet]'`. "
        "Default: jsonl.",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="The dtype of the stored maps. Default: float32.",
    )
    group.add_argument(
        "--grid",
        type=grid,
        metavar="H,W",
        help="Resample all maps to one grid of patches. Their sums stay the same.",
    )
    group.add_argument(
        "--artifacts",
        action="store_true",
        help="Report artifact tokens, which are found in the same pass.",
    )
    group.add_argument(
        "--facets",
        nargs="+",
        choices=("query", "key", "value"),
        default=(),
        help="Store what the kernel was given for the patches too, with heads joined.",
    )
    group.add_argument(
        "--statistics",
        type=names_of_statistics,
        metavar="NAME,…",
        default=(),
        help="Store statistics of each head and token too: entropy, distance, received, "
        "prefix_mass, spread, centroid.",
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="How many images of one size run together. Default: up to 16.",
    )
    group.add_argument(
        "--shard-size",
        type=positive,
        metavar="N",
        help="How many images a shard holds. Default: up to 1024, and about 128 MiB.",
    )
    group.add_argument(
        "--workers",
        type=whole,
        metavar="N",
        help="How many processes decode images. Default: the number of cores minus one, up to 16.",
    )
    group.add_argument(
        "--strict", action="store_true", help="Stop at the first image that has no maps."
    )
    group.add_argument(
        "--retry",
        action="store_true",
        help="Try the images again that had no maps in an earlier run.",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="Read finished shards again and write those whose bytes were changed or damaged. "
        "Their indexes are always compared.",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="Print what would be written and skipped, and write nothing.",
    )


def run(args: argparse.Namespace) -> int:
    """Extract, print the summary, and return 1 if images have no maps."""
    require_libraries()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())  # torchrun: if it is killed, this process has no purpose
        check_torchrun()  # it may have been killed before this
    size, swallowed = image_size(args.image_size or [])
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    early.check_model(args)
    early.check_tokens(args, args.queries or (), args.layers)
    sources = [*args.sources, *swallowed]
    for source in sources:
        if not has_magic(str(source)):
            early.check_input(source, "a folder, a tar, an image, a glob or a list of paths")
    early.check_folder(args.output)
    loaded = load_model(args)
    check_reading(loaded, args)

    from tqdm.contrib.logging import logging_redirect_tqdm

    from dinov2_attn.apps.extraction.bar import Bar
    from dinov2_attn.apps.extraction.extract import extract

    with logging_redirect_tqdm(tqdm_class=Bar):
        done = extract(
            loaded.model,
            sources,
            args.output,
            layers=args.layers,
            queries=args.queries or "cls",
            heads="mean" if args.heads == "mean" else None,
            dtype=args.dtype,
            format=args.format,
            index=args.index,
            grid=args.grid,
            artifacts=args.artifacts,
            facets=args.facets,
            statistics=args.statistics,
            image_size=size,
            max_pixels=args.max_pixels,
            every=args.every,
            fps=args.fps,
            range=args.range,
            mean=args.mean or loaded.mean,
            std=args.std or loaded.std,
            batch_size=args.batch_size,
            shard_size=args.shard_size,
            workers=_workers() if args.workers is None else args.workers,
            strict=args.strict,
            retry=args.retry,
            verify=args.verify,
            progress=not args.quiet,
            name=loaded.name,
            random=loaded.random,
            warning=loaded.doubt,
            dry_run=args.dry_run,
        )
    if os.environ.get("RANK", "0") == "0":
        say(args, str(done))
        if not args.dry_run:
            _end(args, sources)
    return 1 if done.unreadable else 0


def _end(args: argparse.Namespace, sources: list[Path]) -> None:
    """Print the files, the first image without maps with its reason, and how to go on."""
    say(args, f"wrote {args.output / 'README.md'}: what the files hold  <- open this")
    say(args, f"in Python: {READ.format(str(args.output))}")
    unreadable = args.output / "unreadable.jsonl"
    with unreadable.open(encoding="utf-8") as lines:
        for line in islice(lines, 1):
            first = json.loads(line)
            say(args, f"{unreadable}, first: {first['path']}: {first['reason']}")
    next_one = ["dinov2-attn", "summary", str(args.output), "-o", "sheet.html"]
    if len(sources) == 1 and sources[0].is_dir():
        next_one += ["--images", str(sources[0])]
    say(args, f"next: {shlex.join(next_one)}")


def _workers() -> int:
    """Return how many processes may decode, given those that torchrun started."""
    cores = os.cpu_count() or 1
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(16, max(1, cores // together - 1))


def names_of_statistics(text: str) -> tuple[str, ...]:
    """Read names of statistics with commas between them."""
    names, known = text.split(","), get_args(Statistic)
    if all(name in known and names.count(name) == 1 for name in names):
        return tuple(names)
    raise ArgumentTypeError(
        f"expected some of {', '.join(known)}, with commas between them, each once; found "
        f"{text!r}. Try entropy,distance."
    )


def grid(text: str) -> tuple[int, int]:
    """Read a height and a width."""
    parts = text.split(",")
    if len(parts) != 2:
        raise ArgumentTypeError(f"expected a height and a width; found {text!r}. Try 16,16.")
    return positive(parts[0]), positive(parts[1])
