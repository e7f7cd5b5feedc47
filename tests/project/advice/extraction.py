"""Advice about extractions: their sources, options, folders, and what reads them."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile

import filelock
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

import dinov2_attn
from dinov2_attn import AttentionDataset, attention_maps, extract
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
    "apps/extraction",
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
    "apps/extraction",
    "Spell the positions out",
    lambda lab: extracted(lab, queries=slice(0, 2)),
    lambda lab: extracted(lab, queries=[0, 1]),
)
case(
    "apps/extraction",
    "Try cls",
    lambda lab: extracted(lab, queries="registers"),
    lambda lab: extracted(lab, queries="cls"),
)
case(
    "apps/extraction",
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

# Datasets


def pictures(lab):
    return [Image.fromarray(lab.photograph), Image.fromarray(lab.photograph[::-1].copy())]


def tensors(lab):
    return [image.float() for image in lab.x]


class Streamed(IterableDataset):
    """A dataset without numbers."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Endless:
    """A dataset without a length."""

    def __init__(self, items):
        self.items = items

    def __getitem__(self, number):
        return self.items[number]


class Counted(Endless):
    def __len__(self):
        return len(self.items)


case(
    "apps/extraction",
    "PIL.Image.open(path)",
    lambda lab: extracted(lab, [lab.image, *pictures(lab)]),
    lambda lab: extracted(lab, [Image.open(lab.image), *pictures(lab)]),
)
for dataset, inside in (
    (lambda lab: tensors(lab), lambda loader: loader.dataset),
    (lambda lab: Streamed(tensors(lab)), lambda loader: list(loader.dataset)),
):
    case(
        "apps/extraction",
        "batches are made here",
        lambda lab, dataset=dataset: extracted(lab, DataLoader(dataset(lab))),
        lambda lab, dataset=dataset, inside=inside: extracted(
            lab, inside(DataLoader(dataset(lab)))
        ),
    )
case(
    "apps/extraction",
    "Give list(source), where that fits in memory, or images in a folder or a tar",
    lambda lab: extracted(lab, Streamed(tensors(lab))),
    lambda lab: (
        extracted(lab, list(Streamed(tensors(lab)))),
        extracted(lab, source(lab), out="of-folder"),
        extracted(lab, in_tar(lab), out="of-tar"),
    ),
)
case(
    "apps/extraction",
    "Give a list of pictures",
    lambda lab: extracted(lab, {"image": pictures(lab)[0]}),
    lambda lab: extracted(lab, pictures(lab)),
)
case(
    "apps/extraction",
    "Give it a __len__, or make a list of its items",
    lambda lab: extracted(lab, Endless(tensors(lab))),
    lambda lab: (
        extracted(lab, Counted(tensors(lab))),
        extracted(lab, list(Endless(tensors(lab))), out="of-list"),
    ),
)
case(
    "apps/extraction",
    "Give at least one",
    lambda lab: extracted(lab, Counted([])),
    lambda lab: extracted(lab, Counted(tensors(lab)[:1])),
)

# What items hold


def item(snippet, wrong, right, **options):
    """Follow the advice about one item of a dataset."""
    case(
        "apps/extraction",
        snippet,
        lambda lab: extracted(lab, Counted([wrong(tensors(lab)[0])]), **options),
        lambda lab: extracted(lab, Counted(as_list(right(wrong(tensors(lab)[0])))), out="again"),
    )


def as_list(found):
    return found if isinstance(found, list) else [found]


item(
    "Put the channels first, and convert to RGB",
    lambda image: image.permute(1, 2, 0)[..., :2],
    lambda tensor: tensor.permute(2, 0, 1)[[0, 1, 1]],
)
item("tensor.to_dense()", lambda image: image.to_sparse(), lambda tensor: tensor.to_dense())
item("the batch: tensor[0]", lambda image: image[None], lambda tensor: tensor[0])
item("list(tensor)", lambda image: torch.stack([image, image]), lambda tensor: list(tensor))
item("tensor.expand(3, -1, -1)", lambda image: image[0], lambda t: t.expand(3, -1, -1))
item("Give one image", lambda image: image[0, 0], lambda row: row.expand(3, 2, -1))
item(
    "tensor.float() / 255",
    lambda image: image.abs().mul(50).byte(),
    lambda tensor: tensor.float() / 255,
)
item(
    "Image.fromarray(array) for uint8 (H, W, 3)",
    lambda image: image.abs().mul(50).byte().permute(1, 2, 0).numpy(),
    Image.fromarray,
)
item(
    "torch.from_numpy(array) for floats (C, H, W)",
    lambda image: image.numpy(),
    torch.from_numpy,
)
item(
    "Say which it is in a dataset of your own",
    lambda image: {"photo": image},
    lambda entry: entry["photo"],
)
item(
    "Leave image_size out, and resize in a transform",
    lambda image: image,
    lambda image: torch.nn.functional.interpolate(image[None], (4, 4))[0],
    image_size=4,
)
case(
    "apps/extraction",
    "Crop or resize it, in its transform say",
    lambda lab: extracted(lab, [tensors(lab)[0][:, :3]]),
    lambda lab: [
        extracted(lab, [tensors(lab)[0][:, :3]], transform=transform, out=name)
        for name, transform in {
            "cropped": lambda image: image[:, :2],
            "resized": lambda image: torch.nn.functional.interpolate(image[None], (4, 4))[0],
        }.items()
    ],
)
case(
    "apps/extraction",
    "Shrink it, or allow it with --max-pixels N",
    lambda lab: extracted(lab, pictures(lab), max_pixels=23),
    lambda lab: (
        extracted(lab, [one.resize((4, 4)) for one in pictures(lab)], max_pixels=23, out="small"),
        extracted(lab, pictures(lab), max_pixels=24, out="allowed"),
    ),
)


class Opening(Counted):
    """A dataset that opens files in a way of its own."""

    def __getitem__(self, number):
        return torch.from_numpy(np.array(Image.open(self.items[number]))).permute(2, 0, 1) / 255


case(
    "apps/extraction",
    "Check that an image viewer opens it",
    lambda lab: extracted(lab, Opening([lab.written("half.png", b"\x89PNG cut short")])),
    lambda lab: extracted(lab, Opening([lab.image]), out="again"),
)

# Folders of extractions


case(
    "apps/extraction",
    "Name another folder, or ask as before",
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
