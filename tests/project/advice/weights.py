"""Advice about checkpoints: files of weights, folders of them, and the models that they are of."""

from __future__ import annotations

import gzip
import json
import re

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from dinov2_attn import load_checkpoint
from dinov2_attn.apps.weights.architecture import infer
from dinov2_attn.apps.weights.models import build_like
from dinov2_attn.apps.weights.reading import read
from tests.project.advice.lab import copied, made
from tests.support import checkpoint_files
from tests.support.advice import Table

CASES = Table()
case = CASES.add


# What is handed to load_checkpoint

case(
    "apps/weights",
    "Call model.to_empty(device='cpu') first",
    lambda lab: load_checkpoint(made().to("meta"), lab.weights),
    lambda lab: load_checkpoint(made().to("meta").to_empty(device="cpu"), lab.weights),
)
case(
    "apps/weights",
    "Pass its state_dict()",
    lambda lab: load_checkpoint(lab.model, copied(lab.model)),
    lambda lab: load_checkpoint(lab.model, copied(lab.model).state_dict()),
)
case(
    "apps/weights",
    "Pass model.state_dict()",
    lambda lab: load_checkpoint(lab.model, {"epoch": 3}),
    lambda lab: load_checkpoint(lab.model, copied(lab.model).state_dict()),
)
case(
    "apps/weights",
    "interpolate_pos_embed=True",
    lambda lab: load_checkpoint(made(img_size=8), lab.weights),
    lambda lab: load_checkpoint(made(img_size=8), lab.weights, interpolate_pos_embed=True),
)
case(
    "apps/weights",
    "build that in place of",
    lambda lab: load_checkpoint(made(depth=3), lab.weights),
    lambda lab: load_checkpoint(build_like(infer(read(lab.weights))), lab.weights),
)
case(
    "apps/weights",
    "Build the model as it was when it was saved",
    lambda lab: load_checkpoint(made(hidden=256), lab.weights),
    lambda lab: load_checkpoint(made(hidden=128), lab.weights),
)
case(
    "apps/weights",
    "as it was when it was saved",
    lambda lab: load_checkpoint(made(layer_scale=False), lab.weights),
    lambda lab: load_checkpoint(made(layer_scale=True), lab.weights),
)


# Files

case(
    "apps/weights",
    "Name the .pth file itself.",
    lambda lab: lab.heatmap(weights=lab.folder / "absent.pth"),
    lambda lab: lab.heatmap(weights=lab.weights),
)
case(
    "apps/weights",
    "Save a state dict: torch.save(model.state_dict(), path)",
    lambda lab: read(lab.saved([1, 2])),
    lambda lab: lab.heatmap(weights=lab.saved(made().state_dict())),
)
case(
    "apps/weights",
    "save its weights: torch.save(model.state_dict(), PATH)",
    lambda lab: lab.heatmap(weights=lab.saved(nn.Linear(2, 2))),
    lambda lab: lab.heatmap(weights=lab.saved(made().state_dict())),
)


def safetensors(lab, share=1.0, name="model.safetensors", **metadata):
    save_file(made().state_dict(), lab.path(name), metadata or None)
    content = lab.path(name).read_bytes()
    return lab.written(name, content[: int(len(content) * share)])


case(
    "apps/weights",
    "Download it again",
    lambda lab: lab.heatmap(weights=safetensors(lab, 0.5)),
    lambda lab: lab.heatmap(weights=safetensors(lab)),
)


def of_old(lab, share=1.0):
    """Write a checkpoint in the format before PyTorch 1.6, cut short."""
    path = lab.path("old.pth")
    torch.save(made().state_dict(), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    return lab.written("old.pth", content[: int(len(content) * share)])


case(
    "apps/weights",
    "Download it again",
    lambda lab: lab.heatmap(weights=of_old(lab, 0.5)),
    lambda lab: lab.heatmap(weights=of_old(lab)),
)


def sharded(lab):
    return {"_fsdp_wrapped_module._flat_param": torch.ones(9)}


case(
    "apps/weights",
    "Take the teacher_checkpoint.pth",
    lambda lab: load_checkpoint(made(), lab.saved(sharded(lab), "model.rank_0.pth")),
    lambda lab: load_checkpoint(
        made(),
        lab.saved(
            {"teacher": checkpoint_files.training(made()).state_dict()}, "teacher_checkpoint.pth"
        ),
    ),
)


def unpacked(lab):
    return lab.written("unpacked.pth", gzip.decompress((lab.folder / "packed.pth.gz").read_bytes()))


case(
    "apps/weights",
    "Unpack it and name the file inside",
    lambda lab: lab.heatmap(
        weights=lab.written("packed.pth.gz", gzip.compress(lab.weights.read_bytes()))
    ),
    lambda lab: lab.heatmap(weights=unpacked(lab)),
)
case(
    "apps/weights",
    "Name the checkpoint. Images are given before the options",
    lambda lab: lab.heatmap(weights=lab.image),
    lambda lab: lab.heatmap(weights=lab.weights),
)


def arrays(lab):
    with lab.path("arrays.npz").open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in made().state_dict().items()})
    return lab.path("arrays.npz")


case(
    "apps/weights",
    "torch.save({name: torch.from_numpy(array), …}, PATH)",
    lambda lab: load_checkpoint(made(), arrays(lab)),
    lambda lab: load_checkpoint(
        made(),
        lab.saved({name: torch.from_numpy(a) for name, a in np.load(arrays(lab)).items()}),
    ),
)
case(
    "apps/weights",
    "Name the checkpoint.",
    lambda lab: load_checkpoint(made(), lab.written("notes.pth", b"403 Forbidden")),
    lambda lab: load_checkpoint(made(), lab.weights),
)


# Folders


def folder(lab, name, config=None, files=("model.pth",)):
    """Write a folder with checkpoints, and what a config.json says of them."""
    for file in files:
        lab.saved(made().state_dict(), f"{name}/{file}")
    if config is not None:
        lab.path(f"{name}/config.json").write_text(json.dumps(config))
    lab.path(f"{name}/x")
    return lab.folder / name


case(
    "apps/weights",
    "Name the file of weights, or the folder that holds both",
    lambda lab: load_checkpoint(made(), folder(lab, "both", {"a": 1}) / "config.json"),
    lambda lab: (
        load_checkpoint(made(), lab.folder / "both"),
        load_checkpoint(made(), lab.folder / "both" / "model.pth"),
    ),
)
case(
    "apps/weights",
    "or a folder with one file of weights",
    lambda lab: load_checkpoint(made(), folder(lab, "two", files=("a.pth", "b.pth"))),
    lambda lab: (
        load_checkpoint(made(), lab.folder / "two" / "a.pth"),
        load_checkpoint(made(), folder(lab, "one")),
    ),
)


def parts(lab, names=("model-00001-of-00002.bin", "model-00002-of-00002.bin"), index=True):
    """Write a checkpoint in parts with an index, and return the folder."""
    state = list(made().state_dict().items())
    half = len(state) // 2
    pieces = dict(zip(PARTS, (dict(state[:half]), dict(state[half:])), strict=True))
    for name in names:
        lab.saved(pieces[name], f"parts/{name}")
    weight_map = {key: name for name, piece in pieces.items() for key in piece}
    text = json.dumps({"weight_map": weight_map} if index else {})
    lab.path("parts/pytorch_model.bin.index.json").write_text(text)
    return lab.folder / "parts"


PARTS = ("model-00001-of-00002.bin", "model-00002-of-00002.bin")
case(
    "apps/weights",
    "Name the folder, with all parts and their index",
    lambda lab: load_checkpoint(made(), parts(lab) / PARTS[0]),
    lambda lab: load_checkpoint(made(), re.search(r": (.*)$", lab.hint)[1]),
)
case(
    "apps/weights",
    "or name the file of weights itself",
    lambda lab: load_checkpoint(made(), parts(lab, (), index=False)),
    lambda lab: load_checkpoint(made(), lab.weights),
)
case(
    "apps/weights",
    "Download the parts into the folder of their index",
    lambda lab: load_checkpoint(made(), parts(lab, PARTS[:1])),
    lambda lab: load_checkpoint(made(), parts(lab)),
)
case(
    "apps/weights",
    "Correct the file, or move the weights to a folder without it",
    lambda lab: read(folder(lab, "wrong", {"hidden_size": "big"})),
    lambda lab: (
        read(folder(lab, "right", {"hidden_size": 64})),
        read(folder(lab, "without")),
    ),
)
