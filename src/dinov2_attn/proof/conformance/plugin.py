"""The suite's two options, and the code that they point to."""

from __future__ import annotations

import pytest

from dinov2_attn.proof.conformance.code import CODE
from dinov2_attn.proof.conformance.loading import load


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--dinov2`` and ``--package``."""
    group = parser.getgroup("dinov2-attn", "conformance of a copy of DINOv2's code")
    group.addoption(
        "--dinov2",
        metavar="PATH",
        help="what holds the code: a checkout, a site-packages folder, a wheel; "
        "default: what Python finds",
    )
    group.addoption(
        "--package",
        metavar="NAME",
        default="dinov2",
        help="the package to prove, such as moge.model.dinov2; default: dinov2",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Import the code at hand, once, before tests are collected for its classes."""
    config.stash[CODE] = load(config.getoption("--package"), config.getoption("--dinov2"))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which code is proved, and what was passed over."""
    return config.stash[CODE].describe()
