"""What one target is: a project, where its code comes from, and how to build and run a model of it.

Builders import the project's own classes and call them. No code of a project is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

from torch import nn

from tests.wild.weights import images


@dataclass(frozen=True)
class PyPI:
    """A wheel, downloaded without its dependencies."""

    requirement: str

    @property
    def project(self) -> str:
        return self.requirement.partition("==")[0]

    @property
    def revision(self) -> str:
        return self.requirement.partition("==")[2]


@dataclass(frozen=True)
class Installed:
    """A library that the environment of the tests has itself (extra ``test``)."""

    project: str

    @property
    def revision(self) -> str:
        try:
            return version(self.project)
        except PackageNotFoundError:
            return "not installed"


@dataclass(frozen=True)
class GitHub:
    """A repository on GitHub, at one commit."""

    repository: str
    commit: str

    @property
    def project(self) -> str:
        return self.repository

    @property
    def revision(self) -> str:
        return self.commit[:7]

    @property
    def folder(self) -> str:
        return self.repository.replace("/", "+")


Source: TypeAlias = PyPI | Installed | GitHub


def run_on_images(model: nn.Module) -> Any:
    """Call ``model`` with a batch of two images of 28 x 42 pixels, patches of 14 being usual."""
    return model(images(2, 28, 42))


@dataclass(frozen=True)
class Target:
    """One model of one project.

    Attributes:
        name: What ``python -m tests.wild.run`` is given.
        source: Where the code comes from.
        differs: How its attention differs from DINOv2's own, in a few words.
        build: Returns a small model with random, sharp weights.
        run: Runs it on a small input, the same in every call.
        path: The folder inside the source that goes on ``sys.path``.
        bare: Packages that are entered without running their ``__init__``.
        stubs: Modules that the project imports and the model does not need. Each becomes an
            object that takes any attribute and any call.
        needs: Small libraries that the project imports, as requirements on PyPI.

    """

    name: str
    source: Source
    differs: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], Any] = run_on_images
    path: str = ""
    bare: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
