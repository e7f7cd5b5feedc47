"""Advice about extractions of datasets: what they are, and what their items hold."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from tests.project.advice.extraction import extracted, in_tar, source
from tests.support.advice import Table

CASES = Table()
case = CASES.add

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
    "Return one of them from a dataset of your own",
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
    "Crop or resize it, for example in a transform",
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
