"""Advice about pictures of a training."""

from __future__ import annotations

from torch import nn

from dinov2_attn import AttentionLogger
from tests.project.advice.lab import copied
from tests.support.advice import Table

CASES = Table()
case = CASES.add


class Pages:
    """What takes images."""

    def add_image(self, *_, **__):
        """Keep none."""


def logged(lab, model=None, images=None, to=None, **options):
    model = lab.small if model is None else model
    images = lab.image if images is None else images
    assert AttentionLogger(model, images, to or Pages(), **options)(0)


def both(lab):
    return nn.ModuleDict({"student": lab.small, "teacher": nn.Sequential(copied(lab.small))})


case(
    "backbone",
    "Pass the module itself.",
    lambda lab: logged(lab, "small"),
    logged,
)
case(
    "apps/training",
    "Say which: backbone=",
    lambda lab: logged(lab, both(lab)),
    lambda lab: logged(lab, both(lab), backbone="student"),
)
case(
    "apps/training",
    "Did you mean",
    lambda lab: logged(lab, both(lab), backbone="studnt"),
    lambda lab: logged(lab, both(lab), backbone="student"),
)
case(
    "apps/training",
    "Try 500.",
    lambda lab: logged(lab, every=0),
    lambda lab: logged(lab, every=500),
)
case(
    "apps/training",
    'Try "cls".',
    lambda lab: logged(lab, queries=[]),
    lambda lab: logged(lab, queries="cls"),
)
case(
    "apps/training",
    "Pass the path of one.",
    lambda lab: logged(lab, images=[]),
    lambda lab: logged(lab, images=[lab.image]),
)
case(
    "apps/training",
    "Pass torch.utils.tensorboard.SummaryWriter(folder), or what wandb.init() returns",
    lambda lab: logged(lab, to=object()),
    logged,
)
