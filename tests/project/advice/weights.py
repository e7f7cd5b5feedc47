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
from dinov2_attn.apps.demo import load as demo
from dinov2_attn.apps.weights.architecture import infer
from dinov2_attn.apps.weights.models import build, build_like
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
    "Unpack it, and name the file that was inside",
    lambda lab: lab.heatmap(
        weights=lab.written("packed.pth.gz", gzip.compress(lab.weights.read_bytes()))
    ),
    lambda lab: lab.heatmap(weights=unpacked(lab)),
)
case(
    "apps/weights",
    "Name the checkpoint; images go before the options",
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


# The number of heads, and what a file beside the weights says


def asked_by_hint(lab):
    return re.search(r"--num-heads N: (\d+)", lab.hint)[1]


def of_features(lab, features, **metadata):
    state = made(embed_dim=features).state_dict()
    save_file(state, lab.path("features.safetensors"), metadata or None)
    return lab.folder / "features.safetensors"


case(
    "apps/weights",
    "Give it with --num-heads N",
    lambda lab: lab.heatmap(weights=of_features(lab, 72)),
    lambda lab: (
        lab.heatmap("--num-heads", asked_by_hint(lab), weights=of_features(lab, 72)),
        lab.heatmap(weights=of_features(lab, 72, num_heads="2")),
    ),
)
case(
    "apps/weights",
    "Give another with --num-heads N",
    lambda lab: lab.heatmap("--num-heads", 3, weights=lab.weights),
    lambda lab: lab.heatmap("--num-heads", asked_by_hint(lab), weights=lab.weights),
)
case(
    "apps/weights",
    "Leave out --num-heads",
    lambda lab: lab.heatmap("--num-heads", 2, weights=safetensors(lab, num_heads="1")),
    lambda lab: lab.heatmap(weights=safetensors(lab, num_heads="1")),
)
case(
    "apps/weights",
    "Save it again with the number of heads as text",
    lambda lab: lab.heatmap(weights=safetensors(lab, num_heads="two")),
    lambda lab: lab.heatmap(weights=safetensors(lab, num_heads="2")),
)
STATED = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
case(
    "apps/weights",
    "Build it with ",
    lambda lab: load_checkpoint(made(), folder(lab, "stated", STATED)),
    lambda lab: load_checkpoint(made(num_heads=2), folder(lab, "stated", STATED)),
)


def with_eps(model, eps):
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
    return model


EPS = {"hidden_size": 64, "num_hidden_layers": 2, "layer_norm_eps": 1e-5}
case(
    "apps/weights",
    "Set it on each: norm.eps",
    lambda lab: load_checkpoint(made(), folder(lab, "eps", EPS)),
    lambda lab: load_checkpoint(with_eps(made(), 1e-5), folder(lab, "eps", EPS)),
)


# Which model of a file

case(
    "apps/weights",
    "Name the file of the backbone",
    lambda lab: lab.heatmap(weights=lab.saved({"head.weight": torch.ones(3, 3)}, "head.pth")),
    lambda lab: lab.heatmap(weights=lab.weights),
)


def several(lab):
    return lab.saved({"one": made().state_dict(), "two": made(1).state_dict()})


def chosen(lab):
    key = re.search(r"--key (\S+),", lab.hint)[1]
    lab.heatmap("--key", key, weights=several(lab))
    return load_checkpoint(made(), several(lab), key=key)


case("apps/weights", "Choose one: --key ", lambda lab: lab.heatmap(weights=several(lab)), chosen)
case(
    "apps/weights",
    "Name one of them, or leave out the key",
    lambda lab: load_checkpoint(made(), several(lab), key="three"),
    lambda lab: (
        load_checkpoint(made(), several(lab), key="two"),
        load_checkpoint(made(), lab.weights),
    ),
)


def in_chunks(lab, second):
    """Write two chunks of one block each; the block of the second is called ``second``."""
    numbers = {"0": "0.0", "1": second}
    names = {
        name: re.sub(r"^blocks\.(\d)", lambda match: f"blocks.{numbers[match[1]]}", name)
        for name in made().state_dict()
    }
    return lab.saved({names[name]: tensor for name, tensor in made().state_dict().items()})


case(
    "apps/weights",
    "number them through",
    lambda lab: load_checkpoint(made(), in_chunks(lab, "1.0")),
    lambda lab: load_checkpoint(made(), in_chunks(lab, "1.1")),
)


# Models by name

case(
    "apps/weights",
    "Name one.",
    lambda _: build("vit_tiny"),
    lambda lab: build("vit_small", img_size=28),
)
case(
    "apps/weights",
    "The published models have 14",
    lambda lab: lab.heatmap("--random-weights", "--patch-size", 600, "--image-size", 28),
    lambda lab: lab.heatmap("--random-weights", "--patch-size", 14, "--image-size", 28),
)
case(
    "apps/weights",
    "or take a model without registers",
    lambda lab: lab.heatmap("--random-weights", "--registers", "--image-size", 28),
    lambda lab: lab.heatmap("--random-weights", "--image-size", 28),
)
case(
    "apps/weights",
    "Give your own with --weights PATH, or run without meaning with --random-weights",
    lambda lab: lab.heatmap("--patch-size", 2),
    lambda lab: (
        lab.heatmap("--patch-size", 2, weights=lab.weights),
        lab.heatmap("--patch-size", 2, "--random-weights"),
    ),
)


# The model that ships

case(
    "apps/demo",
    "Install the package",
    lambda lab: demo.fill(demo.build(), lab.written("model.safetensors", b"cut short")),
    lambda _: demo.fill(demo.build(), demo.PATH),
)
