"""Advice about photographs: files of every kind, arrays, sizes and ranges."""

from __future__ import annotations

import os
import re
import shlex
import struct

import numpy as np
from PIL import Image

from dinov2_attn import viz
from dinov2_attn.apps.explorer.explore import explore
from dinov2_attn.apps.viz import videos
from dinov2_attn.apps.viz.videos import open_video
from tests.support import raw_files
from tests.support.advice import Table

CASES = Table()
case = CASES.add


# Files

case(
    "apps/viz",
    "Check the path and that an image viewer opens it",
    lambda lab: lab.read(lab.folder / "absent.png"),
    lambda lab: lab.read(lab.image),
)


def postscript(lab):
    Image.fromarray(lab.photograph).save(lab.path("drawing.eps"))
    return lab.folder / "drawing.eps"


def in_png(lab):
    Image.fromarray(lab.photograph).save(lab.path("drawing.png"))
    return lab.folder / "drawing.png"


def pipe(lab):
    os.mkfifo(lab.folder / "pipe.png")
    return lab.folder / "pipe.png"


def cut_short(lab):
    path = lab.array("short.npy", np.zeros((4, 6, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:-1])
    return path


case(
    "apps/viz",
    "Save the image in a file first",
    lambda lab: lab.read(pipe(lab)),
    lambda lab: lab.read(lab.image),
)
case(
    "apps/viz",
    "Save the array again",
    lambda lab: lab.read(cut_short(lab)),
    lambda lab: lab.read(lab.array("short.npy", np.zeros((4, 6, 3), np.uint8))),
)
case(
    "apps/viz",
    "Check that an image viewer opens it",
    lambda lab: lab.read(lab.written("a.jpg", b"\xff\xd8\xff" + bytes(50_000))),
    lambda lab: lab.read(lab.image),
)
case(
    "apps/viz",
    "Convert it to PNG",
    lambda lab: lab.read(postscript(lab)),
    lambda lab: lab.read(in_png(lab)),
)
case(
    "apps/viz",
    "or allow it with --max-pixels N",
    lambda lab: lab.heatmap("--max-pixels", 23, weights=lab.weights),
    lambda lab: (
        lab.heatmap("--max-pixels", 24, weights=lab.weights),
        lab.read(lab.image, max_pixels=24),
    ),
)
case(
    "apps/viz",
    "Save one image with its channels last",
    lambda lab: lab.read(lab.array("batch.npy", np.zeros((2, 3, 4, 6), np.uint8))),
    lambda lab: lab.read(lab.array("one.npy", np.zeros((4, 6, 3), np.uint8))),
)
case(
    "apps/viz",
    "Save array.transpose(1, 2, 0)",
    lambda lab: lab.read(lab.array("planes.npy", np.zeros((3, 4, 6), np.uint8))),
    lambda lab: lab.read(lab.array("planes.npy", np.zeros((3, 4, 6), np.uint8).transpose(1, 2, 0))),
)
case(
    "apps/viz",
    "saved as .npy",
    lambda lab: lab.read(lab.image, channels=5),
    lambda lab: (
        lab.read(lab.array("five.npy", np.zeros((4, 6, 5), np.uint8)), channels=5),
        lab.read(raw_files.tiff(lab.path("f.tif"), np.zeros((4, 6, 5), np.uint8)), channels=5),
    ),
)


def silicon_graphics(lab, values):
    """Write colours of 16 bits as a compressed SGI file, of which Pillow reads the upper 8."""
    height, width, channels = values.shape
    head = struct.pack(">hBBHHHHii", 474, 1, 2, 3, width, height, channels, 0, 65535).ljust(512)
    rows = values[::-1].transpose(2, 0, 1).reshape(-1, width).astype(">u2")
    runs = [struct.pack(">H", 0x80 | width) + row.tobytes() + b"\0\0" for row in rows]
    first, length = 512 + 8 * len(runs), len(runs[0])
    starts = struct.pack(f">{len(runs)}I", *range(first, first + length * len(runs), length))
    lengths = struct.pack(f">{len(runs)}I", *[length] * len(runs))
    return lab.written("colours.sgi", head + starts + lengths + b"".join(runs))


DARK = np.arange(72, dtype=np.uint16).reshape(4, 6, 3)
case(
    "apps/viz",
    "or save it as TIFF",
    lambda lab: lab.read(silicon_graphics(lab, DARK)),
    lambda lab: (
        lab.read(silicon_graphics(lab, DARK * (65535 // 71))),
        lab.read(raw_files.tiff(lab.path("colours.tif"), DARK)),
    ),
)

# Ranges and normalisation


def floats(lab, values):
    return lab.array("floats.npy", np.asarray(values, np.float32))


RAMP = np.linspace(0, 4000, 24).reshape(4, 6)
case(
    "apps/viz",
    "Replace them, and save the image again",
    lambda lab: lab.read(floats(lab, np.where(RAMP > 2000, np.nan, RAMP)), range="auto"),
    lambda lab: lab.read(floats(lab, np.where(RAMP > 2000, 0, RAMP)), range="auto"),
)


def drawn(lab, path, *options):
    lab.typed("heatmap", path, "-o", lab.folder / "out", "--weights", lab.weights, *options)


def with_range(values):
    """Give the program the option of the hint, and the other one that it names."""

    def right(lab):
        option = re.search(r"--range\S* ?\S*?,\S+?(?=, or)", lab.hint)[0]
        drawn(lab, floats(lab, values), *shlex.split(option))
        drawn(lab, floats(lab, values), "--range", "auto")
        low, high = map(float, re.split("[ =]", option)[1].split(","))
        return lab.read(floats(lab, values), range=(low, high))

    return right


for ramp in (RAMP, RAMP - 2000):
    case(
        "apps/viz",
        "Say what is black and what is white",
        lambda lab, ramp=ramp: drawn(lab, floats(lab, ramp)),
        with_range(ramp),
    )
case(
    "apps/viz",
    "Try (0, 4095)",
    lambda lab: lab.read(lab.image, range=(4095, 0)),
    lambda lab: lab.read(lab.image, range=(0, 4095)),
)
case(
    "apps/viz",
    "one for each channel, or one for all",
    lambda lab: lab.read(lab.image, mean=(0.5, 0.5)),
    lambda lab: (
        lab.read(lab.image, mean=(0.5, 0.5, 0.5)),
        lab.read(lab.image, mean=0.5),
        drawn(lab, lab.image, "--mean", "0.5"),
    ),
)
case(
    "apps/viz",
    "it once",
    lambda lab: lab.read(lab.image, mean=(0.5, 0.5), channels=1),
    lambda lab: lab.read(lab.image, mean=0.5, channels=1),
)
case(
    "apps/viz",
    "Divide by 255: ",
    lambda lab: drawn(lab, lab.image, "--mean", "123.675,116.28,103.53"),
    lambda lab: drawn(lab, lab.image, "--mean", re.search(r": (.*)\.$", lab.hint)[1]),
)
case(
    "apps/viz",
    "Try 0.5",
    lambda lab: lab.read(lab.image, std=0),
    lambda lab: lab.read(lab.image, std=0.5),
)

# Sizes

case(
    "apps/viz",
    "Pass the model, or its patch size: 14 for the published ones",
    lambda lab: viz.load_image(lab.image),
    lambda lab: (
        viz.load_image(lab.image, lab.small),
        viz.load_image(lab.image, 2),
        viz.load_image(lab.image, 14, image_size=28),
    ),
)


def tiny(lab):
    Image.new("RGB", (1, 1)).save(lab.path("tiny.png"))
    return lab.folder / "tiny.png"


case(
    "apps/viz",
    "Enlarge it with --image-size",
    lambda lab: drawn(lab, tiny(lab)),
    lambda lab: (drawn(lab, tiny(lab), "--image-size", 4), lab.read(tiny(lab), image_size=4)),
)
case(
    "apps/viz",
    "Give a smaller --image-size",
    lambda lab: drawn(lab, lab.image, "--image-size", 10**6),
    lambda lab: drawn(lab, lab.image, "--image-size", 8),
)


def explored(lab, hook=None):
    """Write the page of a model with a hook, which is removed after."""
    handle = lab.small.blocks[0].register_forward_pre_hook(hook or (lambda *_: None))
    try:
        return explore(lab.small, lab.read(lab.image), lab.folder / "page.html")
    finally:
        handle.remove()


def failing(_, inputs):
    raise ValueError("the user's own")


case(
    "apps/viz",
    "Leave it out, or change the model or its hooks, which raised this",
    lambda lab: explored(lab, failing),
    explored,
)

# Where files go


def in_the_way(lab):
    lab.path("taken/heads.png/x").touch()


case(
    "_files",
    "Name another folder or make room in this one",
    lambda lab: (in_the_way(lab), lab.heatmap(weights=lab.weights, output="taken")),
    lambda lab: (
        lab.heatmap(weights=lab.weights, output="another"),
        (lab.folder / "taken").rename(lab.folder / "moved"),
        lab.heatmap(weights=lab.weights, output="taken"),
    ),
)

# Arrays that are given as photographs


def shown(lab, image):
    return viz.plot(lab.maps(), image=image)


case(
    "apps/viz",
    "Convert to uint8",
    lambda lab: shown(lab, lab.photograph.astype(object)),
    lambda lab: shown(lab, lab.photograph.astype(object).astype(np.uint8)),
)
UNIT = np.linspace(0, 1, 72).reshape(4, 6, 3)
case(
    "apps/viz",
    "Replace them.",
    lambda lab: shown(lab, np.where(UNIT > 0.5, np.nan, UNIT)),
    lambda lab: shown(lab, np.nan_to_num(np.where(UNIT > 0.5, np.nan, UNIT))),
)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
case(
    "apps/viz",
    "undo that: image * std + mean; or pass viz.load_image(...).picture",
    lambda lab: shown(lab, (UNIT - MEAN) / STD),
    lambda lab: (
        shown(lab, (UNIT - MEAN) / STD * STD + MEAN),
        shown(lab, viz.load_image(lab.image, 2).picture),
    ),
)


def scaled(image):
    return (image - image.min()) / (image.max() - image.min())


SIGNED = np.arange(-36, 36).reshape(4, 6, 3)
case(
    "apps/viz",
    "Scale it to 0…1 first: (image - image.min()) / (image.max() - image.min())",
    lambda lab: shown(lab, SIGNED),
    lambda lab: shown(lab, scaled(SIGNED)),
)
DEEP = np.linspace(0, 4000, 72).reshape(4, 6, 3).astype(np.uint16)
case(
    "apps/viz",
    "Divide it by the value of white: image / ",
    lambda lab: shown(lab, DEEP),
    lambda lab: shown(lab, DEEP / int(re.search(r"image / (\d+)", lab.hint)[1])),
)
case(
    "apps/viz",
    "Divide it by the value of white.",
    lambda lab: shown(lab, DEEP.astype(np.int64) * 10**6),
    lambda lab: shown(lab, DEEP.astype(np.int64) * 10**6 / (4000 * 10**6)),
)

case(
    "maps",
    "or for a picture the size of a patch",
    lambda lab: viz.load_image(lab.image, lab.block),
    lambda lab: (viz.load_image(lab.image, lab.small), viz.load_image(lab.image, 2)),
)


def video(path, **options):
    return list(open_video(path, **options).frames())


case(
    "apps/viz",
    "Leave it out for all frames",
    lambda lab: videos.sampling_of(1, 0),
    lambda lab: videos.sampling_of(1, None),
)
case(
    "apps/viz",
    "To draw the images of a folder one by one, name them",
    lambda lab: video(lab.frames_of_two_sizes),
    lambda lab: [lab.read(path) for path in videos.images_in(lab.frames_of_two_sizes)],
)
case(
    "apps/viz",
    "Name a video such as clip.mp4, or a folder of images",
    lambda lab: video(lab.path("empty/none").parent),
    lambda lab: video(lab.frames_of_two_sizes, sampling=videos.Sampling(every=2)),
)
