"""Advice about extractions: their sources, options, folders, and what reads them."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tarfile

import filelock
from PIL import Image

import dinov2_attn
from dinov2_attn import AttentionDataset, attention_maps, extract
from dinov2_attn.apps.export.asked import read_asked
from dinov2_attn.errors import UnreadableFileError
from tests.backbone import test_channel_adaptive
from tests.support.advice import Table
from tests.support.extraction import photographs

CASES = Table()
case = CASES.add


def source(lab):
    return photographs(lab.path("in/x").parent, 3)


def extracted(lab, given=None, **options):
    """Extract into ``out``; raise the reason of the first image without maps."""
    out = lab.folder / options.pop("out", "out")
    given = source(lab) if given is None else given
    extract(lab.small, given, out, **options)
    stored = AttentionDataset(out)
    for entry in stored.unreadable():
        raise UnreadableFileError("maps of every image", entry["path"], entry["reason"])
    assert len(stored) > 0
    return stored


def training(lab):
    lab.small.train()
    return lab


def evaluating(lab):
    lab.small.eval()
    return lab


case(
    "backbone",
    "Call model.eval()",
    lambda lab: extracted(training(lab)),
    lambda lab: extracted(evaluating(lab)),
)


def adaptive(lab, ask):
    model = test_channel_adaptive.build(lab.upstream)
    with dinov2_attn.install(model):
        return ask(model)


case(
    "apps/extraction",
    "Pass tensors of your channels (B, C, H, W) to attention_maps(model, images)",
    lambda lab: adaptive(lab, lambda model: extract(model, source(lab), lab.folder / "out")),
    lambda lab: adaptive(lab, lambda model: attention_maps(model, lab.x[:, :2])),
)

case(
    "apps/extraction",
    "Leave it out for safetensors.",
    lambda lab: extracted(lab, format="npz"),
    lambda lab: extracted(lab),
)
case(
    "apps/extraction",
    "Leave it out for index.jsonl alone.",
    lambda lab: extracted(lab, index="csv"),
    lambda lab: extracted(lab),
)
case(
    "apps/export",
    "Name layers first: last, all, or numbers from 0 on. Try last:cls",
    lambda lab: read_asked("cls"),
    lambda lab: [read_asked(text) for text in ("last", "all", "0,1:patches", "last:cls")],
)


def linked_lock(lab):
    lab.written("out/.lock", b"").unlink()
    (lab.folder / "out" / ".lock").symlink_to("elsewhere")
    return lab


case(
    "apps/extraction",
    "Remove it, or name another folder",
    lambda lab: extracted(linked_lock(lab)),
    lambda lab: ((lab.folder / "out" / ".lock").unlink(), extracted(lab)),
)
case(
    "_files",
    "Name another file",
    lambda lab: extracted(lab).sheet().save(lab.folder),
    lambda lab: AttentionDataset(lab.folder / "out").sheet().save(lab.folder / "sheet.html"),
)

# Options

case(
    "apps/extraction",
    "Name one.",
    lambda lab: extracted(lab, dtype="int8"),
    lambda lab: [
        extracted(lab, dtype=dtype, out=dtype) for dtype in ("float32", "float16", "bfloat16")
    ],
)
case(
    "apps/extraction",
    "Leave it out for the last",
    lambda lab: extracted(lab, layers=[]),
    lambda lab: extracted(lab),
)
case(
    "apps/viz",
    "Write the position 17 as '#17'",
    lambda lab: extracted(lab, queries="patch"),
    lambda lab: [
        extracted(lab, queries=queries, out=queries) for queries in ("cls", "0,0", "#4", "patches")
    ],
)
case(
    "apps/viz",
    "Positions count CLS first, then the registers, then the patches row by row",
    lambda lab: extracted(lab, queries=slice(100, 200)),
    lambda lab: extracted(lab, queries=slice(1, 3), out="again"),
)
case(
    "apps/viz",
    "Ask for cls, patches or all",
    lambda lab: extracted(lab, queries="registers"),
    lambda lab: [
        extracted(lab, queries=queries, out=queries) for queries in ("cls", "patches", "all")
    ],
)
case(
    "apps/viz",
    "Leave it out for CLS",
    lambda lab: extracted(lab, queries=[]),
    lambda lab: extracted(lab),
)
case(
    "apps/extraction",
    "Try (16, 16)",
    lambda lab: extracted(lab, grid=(16,)),
    lambda lab: extracted(lab, grid=(16, 16)),
)
case(
    "apps/extraction",
    "Leave it out.",
    lambda lab: extracted(lab, batch_size=0),
    lambda lab: extracted(lab),
)
case(
    "apps/extraction",
    "Leave it out.",
    lambda lab: extracted(lab, transform="resize"),
    lambda lab: extracted(lab),
)

# Files as sources


def listed(lab, *names):
    lab.path("list.txt").write_text("".join(f"{name}\n" for name in names))
    return lab.folder / "list.txt"


def in_tar(lab, mode="w"):
    with tarfile.open(lab.path("images.tar"), mode) as tar:
        tar.add(source(lab), "images")
    return lab.folder / "images.tar"


def each_kind(lab):
    """Extract from a folder, a tar, and a list with a path on each line."""
    extracted(lab, source(lab), out="of-folder")
    extracted(lab, in_tar(lab), out="of-tar")
    extracted(lab, listed(lab, "in/000.png"), out="of-list")


case(
    "apps/extraction",
    "Name a folder, a list or a tar",
    lambda lab: extracted(lab, []),
    each_kind,
)
case(
    "apps/extraction",
    "Name a folder, a tar, or a list with a path on each line",
    lambda lab: extracted(lab, lab.path("empty/x").parent),
    each_kind,
)
case(
    "apps/extraction",
    "Check the path and who may read it",
    lambda lab: extracted(lab, lab.folder / "absent"),
    lambda lab: extracted(lab, source(lab)),
)
case(
    "apps/extraction",
    "Check the path and who may read it",
    lambda lab: (source(lab), extracted(lab, listed(lab, "in/absent.png"))),
    lambda lab: (source(lab), extracted(lab, listed(lab, "in/000.png"), out="again")),
)


def pipe(lab, name):
    if not (lab.folder / name).exists():
        os.mkfifo(lab.path(name))
    return lab.folder / name


case(
    "apps/extraction",
    "Write a list into a file first: a pipe can be read only once",
    lambda lab: extracted(lab, pipe(lab, "names")),
    lambda lab: (source(lab), extracted(lab, listed(lab, "in/000.png"))),
)
case(
    "apps/extraction",
    "Leave it out of the source",
    lambda lab: (
        source(lab),
        extracted(lab, listed(lab, "in/000.png", pipe(lab, "pipe.png"))),
    ),
    lambda lab: extracted(lab, listed(lab, "in/000.png"), out="again"),
)
case(
    "apps/extraction",
    "Images are files that Pillow opens, such as .jpg, .png, .tif or .webp",
    lambda lab: extracted(lab, lab.written("model.bin", bytes(64))),
    lambda lab: [extracted(lab, converted(lab, kind), out=kind) for kind in KINDS],
)
KINDS = ("jpg", "png", "tif", "webp")


def converted(lab, kind):
    Image.fromarray(lab.photograph).save(lab.path(f"converted.{kind}"))
    return lab.folder / f"converted.{kind}"


def decompressed(lab):
    content = gzip.decompress((lab.folder / "images.tar").read_bytes())
    return lab.written("plain.tar", content)


case(
    "apps/extraction",
    "Decompress it first",
    lambda lab: extracted(lab, in_tar(lab, "w:gz")),
    lambda lab: extracted(lab, decompressed(lab)),
)

# Folders of extractions


case(
    "apps/extraction",
    "Name another folder, or run with the original options",
    lambda lab: (extracted(lab, heads="mean"), extracted(lab)),
    lambda lab: (extracted(lab, out="another"), extracted(lab, heads="mean")),
)
case(
    "apps/extraction",
    "Name another folder.",
    lambda lab: (lab.written("out/mine.txt", b"x"), extracted(lab)),
    lambda lab: extracted(lab, out="another"),
)
case(
    "apps/extraction",
    "Make room, or name another folder, and run again",
    lambda lab: (lab.written("out", b"a file"), extracted(lab)),
    lambda lab: ((lab.folder / "out").unlink(), extracted(lab), extracted(lab, out="another")),
)


def beside_another_run(lab):
    lock = filelock.FileLock(lab.path("out/.lock"))
    with lock:
        extracted(lab)


case(
    "apps/extraction",
    "Wait for the other run, or name another folder",
    beside_another_run,
    lambda lab: (extracted(lab, out="another"), extracted(lab)),
)


def strict(lab, **options):
    return extracted(lab, strict=True, **options)


def with_a_broken_one(lab):
    source(lab)
    lab.written("in/broken.png", b"no image")
    extract(lab.small, lab.folder / "in", lab.folder / "out")
    return lab


def without_strict(lab):
    assert extract(lab.small, lab.folder / "in", lab.folder / "out").unreadable == 1
    shutil.copy(lab.folder / "in/000.png", lab.folder / "in/broken.png")
    return strict(lab, retry=True)


case(
    "apps/extraction",
    "and run with --retry, or run without --strict",
    lambda lab: strict(with_a_broken_one(lab)),
    without_strict,
)

# Reading


def of_format(lab, number):
    extracted(lab)
    about = json.loads((lab.folder / "out/extraction.json").read_text())
    lab.written("out/extraction.json", json.dumps({**about, "format": number}).encode())
    return AttentionDataset(lab.folder / "out")


case(
    "apps/extraction",
    "extract again into another folder",
    lambda lab: of_format(lab, 1),
    lambda lab: extracted(lab, out="another")[0],
)


def twice(lab):
    photographs(lab.folder / "two", 3)
    return extracted(lab, [source(lab), lab.folder / "two"])


case(
    "apps/extraction",
    "Choose one: dataset.positions(path, source)",
    lambda lab: twice(lab)["000.png"],
    lambda lab: twice(lab)[twice(lab).positions("000.png", "two")[0]],
)
case(
    "apps/extraction",
    "dataset.entries() has all paths",
    lambda lab: extracted(lab)["absent.png"],
    lambda lab: extracted(lab)[next(extracted(lab).entries())["path"]],
)
case(
    "apps/extraction",
    "Sort by prefix mass or entropy, or extract with --artifacts",
    lambda lab: extracted(lab).sheet("artifacts"),
    lambda lab: [
        extracted(lab).sheet("prefix_mass"),
        extracted(lab).sheet("entropy"),
        extracted(lab, artifacts=True, out="another").sheet("artifacts"),
    ],
)
case(
    "apps/extraction",
    "Name one.",
    lambda lab: extracted(lab).sheet("mass"),
    lambda lab: [extracted(lab).sheet(by) for by in ("prefix_mass", "entropy")],
)
case(
    "apps/extraction",
    "Leave it out for the last one",
    lambda lab: extracted(lab).sheet(layer=0),
    lambda lab: extracted(lab).sheet(),
)
case(
    "apps/extraction",
    "Name the folder that `dinov2-attn extract -o` was given",
    lambda lab: (extracted(lab), AttentionDataset(lab.folder)),
    lambda lab: AttentionDataset(lab.folder / "out")[0],
)
case(
    "apps/extraction",
    "len() counts them",
    lambda lab: extracted(lab)[3],
    lambda lab: extracted(lab)[len(extracted(lab)) - 1],
)


def command(lab):
    lab.typed(
        *("extract", source(lab), "-o", lab.folder / "out", "--weights", lab.weights),
        *("--workers", 0),
    )
    return lab.folder / "out"


def stopped(lab):
    (command(lab) / "index.jsonl").unlink()
    return AttentionDataset(lab.folder / "out")


case(
    "apps/extraction",
    "Run the same `dinov2-attn extract` again",
    stopped,
    lambda lab: AttentionDataset(command(lab))[0],
)


def changed(lab):
    shard = command(lab) / "shards/00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    return AttentionDataset(lab.folder / "out")[2]


def extracted_again(lab):
    out = lab.folder / "out"
    for name in ("shards/00000.safetensors", "shards/00000.jsonl", "index.jsonl"):
        (out / name).unlink()
    return AttentionDataset(command(lab))[2]


case(
    "apps/extraction",
    "Remove the shard, its .jsonl and index.jsonl, and run the extraction again",
    changed,
    extracted_again,
)
