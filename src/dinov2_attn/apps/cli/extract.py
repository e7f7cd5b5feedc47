"""``dinov2-attn extract``: the attention of a whole dataset, in shards with an index."""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

from dinov2_attn.apps.cli.argtypes import blocks, positive, whole
from dinov2_attn.apps.cli.image_options import (
    add_image_size,
    check_reading,
    image_size,
    require_libraries,
)
from dinov2_attn.apps.cli.model_options import add_options, load_model

DESCRIPTION = """\
Store the attention maps of every image of SOURCE: a folder, an uncompressed tar (a shard of
WebDataset's, say), a glob, or a list with a path on each line; several may be named. Images are
what Pillow can decode; other files are counted by suffix. OUT gets safetensors shards of maps,
index.jsonl with a line for each image, and unreadable.jsonl with a line for each that cannot be
decoded or on which the model fails. Killed and started again it goes on where it was stopped.
`torchrun --nproc-per-node K -m dinov2_attn extract …` shares the work among K processes.
Exit status: 1 where images have no maps.
"""


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "extract", help="the attention of a whole dataset", description=DESCRIPTION
    )
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    _add_what(parser)
    add_image_size(parser)
    _add_how(parser)
    add_options(parser)
    parser.set_defaults(run=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is stored")
    group.add_argument(
        "--layers",
        type=layers,
        default=[-1],
        metavar="I,J,…",
        help="blocks counted from 0, or with --layers=-1 from the end, or all; default: the last",
    )
    group.add_argument(
        "--queries",
        type=queries,
        default="cls",
        metavar="TOKENS",
        help="cls (default), registers, patches, all, or positions with commas between them",
    )
    group.add_argument("--heads", choices=("each", "mean"), default="each", help="default: each")
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="default: float32",
    )
    group.add_argument(
        "--grid",
        type=grid,
        metavar="H,W",
        help="resample all maps to one grid; sums stay what they are",
    )
    group.add_argument(
        "--outliers", action="store_true", help="report artifact tokens, in the same pass"
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument(
        "--batch-size", type=positive, metavar="N", help="images of one size; default: up to 16"
    )
    group.add_argument(
        "--shard-size",
        type=positive,
        metavar="N",
        help="images in a shard; default: up to 1024, and about 128 MiB",
    )
    group.add_argument(
        "--workers",
        type=whole,
        metavar="N",
        help="processes that decode; default: one less than there are cores, up to 16",
    )
    group.add_argument("--strict", action="store_true", help="stop at an image without maps")
    group.add_argument(
        "--retry", action="store_true", help="try again what has no maps of an earlier run"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="say what would be written and passed over"
    )


def run(args: argparse.Namespace) -> int:
    """Extract, and say what was done."""
    require_libraries()
    size, swallowed = image_size(args.image_size or [])
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    loaded = load_model(args)
    check_reading(loaded.model, args)

    from tqdm.contrib.logging import logging_redirect_tqdm

    from dinov2_attn.apps.extraction.extract import extract

    with logging_redirect_tqdm():
        done = extract(
            loaded.model,
            [*args.sources, *swallowed],
            args.output,
            layers=args.layers,
            queries=args.queries,
            heads="mean" if args.heads == "mean" else None,
            dtype=args.dtype,
            grid=args.grid,
            outliers=args.outliers,
            image_size=size,
            max_pixels=args.max_pixels,
            range=args.range,
            mean=args.mean,
            std=args.std,
            batch_size=args.batch_size,
            shard_size=args.shard_size,
            workers=_workers() if args.workers is None else args.workers,
            strict=args.strict,
            retry=args.retry,
            progress=True,
            name=loaded.name,
            random=loaded.random,
            warning=loaded.doubt,
            dry_run=args.dry_run,
        )
    if os.environ.get("RANK", "0") == "0":
        print(done)
    return 1 if done.unreadable else 0


def _workers() -> int:
    """Return how many processes may decode beside this one, and others that torchrun started."""
    cores = os.cpu_count() or 1
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(16, max(1, cores // together - 1))


def layers(text: str) -> list[int] | None:
    """Read blocks with commas between them, or all."""
    return None if text == "all" else blocks(text)


def queries(text: str) -> str | list[int] | None:
    """Read a word for tokens, or positions with commas between them."""
    if text in ("cls", "registers", "patches"):
        return text
    if text == "all":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentTypeError(
            "expected cls, registers, patches, all, or positions with commas between them; "
            f"found {text!r}. Try cls."
        ) from error


def grid(text: str) -> tuple[int, int]:
    """Read a height and a width."""
    parts = text.split(",")
    if len(parts) != 2:
        raise ArgumentTypeError(f"expected a height and a width; found {text!r}. Try 16,16.")
    return positive(parts[0]), positive(parts[1])
