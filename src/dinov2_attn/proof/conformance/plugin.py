"""The options of the suite, and the code that they name."""

from __future__ import annotations

import pytest
import torch

from dinov2_attn.history.projects import DINOV2, DINOV3
from dinov2_attn.proof.conformance.building import Place
from dinov2_attn.proof.conformance.code import CODE
from dinov2_attn.proof.conformance.loading import load


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--dinov2``, ``--dinov3``, ``--package`` and ``--device``."""
    group = parser.getgroup("dinov2-attn", "conformance of a copy of DINOv2's code")
    group.addoption(
        "--dinov2",
        metavar="PATH",
        help="where the code is: a checkout, a site-packages folder, a wheel; "
        "default: the installed package",
    )
    group.addoption(
        "--dinov3",
        metavar="PATH",
        help="the same for a checkout of DINOv3, whose code is under Meta's DINOv3 License",
    )
    group.addoption(
        "--package",
        metavar="NAME",
        help="the package to test, such as moge.model.dinov2; default: dinov2, or dinov3",
    )
    group.addoption(
        "--device",
        type=torch.device,
        default="cpu",
        metavar="DEVICE",
        help="where the models and tensors are, such as cuda; default: cpu",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Import the tested code once, before tests for its classes are collected."""
    Place.device = torch.device(config.getoption("--device"))
    path = config.getoption("--dinov3")
    package = config.getoption("--package") or (DINOV2 if path is None else DINOV3).package
    config.stash[CODE] = load(package, path or config.getoption("--dinov2"))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Return lines that name the tested code and the modules that were not imported."""
    return config.stash[CODE].describe()
