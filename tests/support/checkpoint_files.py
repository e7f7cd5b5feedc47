"""Checkpoints as they are found in the wild, of real models: upstream's classes and torch's."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from tests.support import upstreams
from tests.support.strategies import randomise

OPTIMIZER = {
    "state": {0: {"step": 3, "exp_avg": torch.ones(2)}},
    "param_groups": [{"lr": 1e-4, "params": [0], "name": "backbone"}],
}


def training(backbone, seed=0):
    """The modules that upstream's training keeps together: a backbone and its heads."""
    head = upstreams.FIRST.module("dinov2.layers").DINOHead
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that its weight norm has a successor
        heads = {
            name: head(backbone.embed_dim, 5, bottleneck_dim=3, hidden_dim=4) for name in HEADS
        }
    modules = nn.ModuleDict({name: randomise(head, seed) for name, head in heads.items()})
    modules["backbone"] = backbone
    return modules


HEADS = ("dino_head", "ibot_head")


def both(teacher, student):
    return nn.ModuleDict({"student": training(student), "teacher": training(teacher)})


def compiled(model):
    """As ``torch.compile`` wraps it. The model need not run for that."""
    return nn.ModuleDict({"_orig_mod": model})


def wrapped_blocks(model):
    """As activation checkpoints or ``torch.compile`` of each block leave it."""
    return {
        name.replace(".norm1.", "._checkpoint_wrapped_module.norm1."): tensor
        for name, tensor in model.state_dict().items()
    }


# Each makes a checkpoint's content from a model, and from another that is not to be taken;
# then what is to be left out.
FORMATS = {
    "the hub's": (lambda model, _: model.state_dict(), set()),
    "teacher_checkpoint.pth": (
        lambda model, _: {"teacher": training(model).state_dict()},
        {"teacher.dino_head", "teacher.ibot_head"},
    ),
    "model_final.pth": (
        lambda model, other: {
            "model": both(model, other).state_dict(),
            "optimizer": OPTIMIZER,
            "iteration": 7,
        },
        {"model.student", "model.teacher.dino_head", "model.teacher.ibot_head"}
        | {"optimizer", "iteration"},
    ),
    "all of the training's modules": (
        lambda model, other: {
            **both(model, other).state_dict(),
            "dino_loss.center": torch.zeros(1, 5),
        },
        {"student", "teacher.dino_head", "teacher.ibot_head", "dino_loss"},
    ),
    "a student alone": (
        lambda model, _: {"student": training(model).state_dict(), "epoch": None},
        {"student.dino_head", "student.ibot_head", "epoch"},
    ),
    "DDP's": (
        lambda model, _: {"state_dict": nn.DataParallel(model).state_dict(), "arch": "vit_small"},
        {"arch"},
    ),
    "DINO v1's": (
        lambda model, other: {
            "student": {f"module.backbone.{k}": v for k, v in other.state_dict().items()},
            "teacher": {f"backbone.{k}": v for k, v in model.state_dict().items()},
            "optimizer": OPTIMIZER,
            "epoch": 100,
            "fp16_scaler": None,
        },
        {"student", "optimizer", "epoch", "fp16_scaler"},
    ),
    "compiled": (lambda model, _: compiled(model).state_dict(), set()),
    "compiled inside of DDP": (
        lambda model, _: {"model": nn.DataParallel(compiled(model)).state_dict()},
        set(),
    ),
    "wrapped blocks": (lambda model, _: wrapped_blocks(model), set()),
    "dicts in dicts": (
        lambda model, _: {"model": {"module": {"backbone": dict(model.state_dict())}}},
        set(),
    ),
    "heads beside a bare backbone": (
        lambda model, _: {**model.state_dict(), "dino_head.last_layer.weight": torch.ones(5, 3)},
        {"dino_head"},
    ),
    "numbers beside a bare backbone": (
        lambda model, _: {**model.state_dict(), "epoch": 3, "note": "mine", "loss": [0.5]},
        {"epoch", "note", "loss"},
    ),
}
