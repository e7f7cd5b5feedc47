"""Advice about models: which of a file, how many heads, by name, and upstream's code."""

from __future__ import annotations

import re
import sys
import zipfile

import torch
from safetensors.torch import save_file

from dinov2_attn import load_checkpoint
from dinov2_attn._download import fetch_wheel
from dinov2_attn.apps.demo import load as demo
from dinov2_attn.apps.weights.models import build
from dinov2_attn.apps.weights.source import obtain
from tests.project.advice.lab import made
from tests.project.advice.weights import folder, safetensors
from tests.support.advice import Table

CASES = Table()
case = CASES.add


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
    "number them consecutively, as upstream does",
    lambda lab: load_checkpoint(made(), in_chunks(lab, "1.0")),
    lambda lab: load_checkpoint(made(), in_chunks(lab, "1.1")),
)


# Models by name

case(
    "apps/weights",
    "Choose one of them",
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
    "or choose a model without registers",
    lambda lab: lab.heatmap("--random-weights", "--registers", "--image-size", 28),
    lambda lab: lab.heatmap("--random-weights", "--image-size", 28),
)
case(
    "apps/weights",
    "Give your own weights with --weights PATH. --random-weights runs without",
    lambda lab: lab.heatmap("--patch-size", 2),
    lambda lab: (
        lab.heatmap("--patch-size", 2, weights=lab.weights),
        lab.heatmap("--patch-size", 2, "--random-weights"),
    ),
)


# The model that ships

case(
    "apps/demo",
    "Reinstall the package",
    lambda lab: demo.fill(demo.build(), lab.written("model.safetensors", b"cut short")),
    lambda _: demo.fill(demo.build(), demo.PATH),
)


# Upstream's code


def checkout(lab, name="checkout", models=True):
    """Unpack upstream's first commit, as `git clone` does; break it if it is without models."""
    folder = lab.path(f"{name}/x").parent
    with zipfile.ZipFile(fetch_wheel(lab.upstream.wheel)) as archive:
        archive.extractall(folder)
    if not models:
        (folder / "dinov2/models/vision_transformer.py").write_text("raise RuntimeError('broken')")
    return folder


def obtained(lab, folder):
    """Obtain upstream's code as a process would that starts here."""
    path = list(sys.path)
    try:
        with lab.upstream.imported_anew():
            return obtain(folder)
    finally:
        sys.path[:] = path


case(
    "apps/weights",
    "Name the folder that `git clone` made",
    lambda lab: obtained(lab, checkout(lab) / "dinov2"),
    lambda lab: obtained(lab, checkout(lab)),
)
case(
    "apps/weights",
    "Choose the source before dinov2 is imported, in a new process",
    lambda lab: obtain(checkout(lab)),
    lambda lab: obtained(lab, checkout(lab)),
)
case(
    "apps/weights",
    " or replace it",
    lambda lab: obtained(lab, checkout(lab, models=False)),
    lambda lab: obtained(lab, checkout(lab)),
)
