"""What every result has in common: one line of text, a notebook's view, devices and files.

Files are in the format of safetensors, which any language reads and which runs no code.
"""

from __future__ import annotations

import base64
import html
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from dinov2_attn import _imports
from dinov2_attn._files import atomic_file, check_is_file
from dinov2_attn.errors import (
    InvalidInputError,
    UnreadableFileError,
    UnwritableOutputError,
    shown_name,
)

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Self, TypeVar

    # What an entry of a result is.
    W = TypeVar("W", default=Tensor)
else:
    from typing import TypeVar

    W = TypeVar("W")

# What is read from a file.
R = TypeVar("R")

Array: TypeAlias = "npt.NDArray[Any]"


class Face:
    """The face of a result: ``repr`` in one line, a table and a picture in a notebook."""

    def _facts(self) -> dict[str, str]:
        raise NotImplementedError

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={shown_name(fact)}" for name, fact in self._facts().items())
        return " ".join(f"{type(self).__name__}({facts})".split())

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(shown_name(fact))}</td></tr>"
            for name, fact in self._facts().items()
        )
        name = html.escape(type(self).__name__)
        table = f"<table><caption>{name}</caption><tbody>{rows}</tbody></table>"
        # A notebook shows a result's HTML in place of its PNG.
        picture = self._repr_png_()
        if picture is None:
            return table
        encoded = base64.b64encode(picture).decode("ascii")
        return f'{table}<img alt="Picture of {name}" src="data:image/png;base64,{encoded}">'

    def _repr_png_(self) -> bytes | None:
        # The engine does not depend on pictures: a notebook that asks for one imports them.
        picture: bytes | None = import_module("dinov2_attn.viz").picture_of(self)
        return picture


@dataclass(frozen=True, eq=False, repr=False)
class Result(Face):
    """Tensors of one batch of images, and how they are laid out."""

    # The fields that are no tensors.
    _LAYOUT: ClassVar[tuple[str, ...]] = ()

    def to(self, device: torch.device | str | int) -> Self:
        """Return the same on ``device``. Gradients flow through it, as through ``Tensor.to``."""
        moved: Self = self._with(lambda tensor: tensor.to(device=device))
        return moved

    def cpu(self) -> Self:
        """Return the same on the CPU, detached from autograd's graph."""
        moved: Self = self._with(lambda tensor: tensor.detach().cpu())
        return moved

    def save(self, path: str | Path) -> None:
        """Write the result to one safetensors file, which appears whole or not at all.

        The metadata hold the kind of the result and its layout as JSON.

        Raises:
            InvalidInputError: The result holds something else than tensors.
            UnwritableOutputError: ``path`` cannot be written.
            UnavailableError: The library safetensors is not installed.

        """
        about = {name: getattr(self, name) for name in self._LAYOUT}
        _write(Path(path), type(self).__name__, self._tensors(), about)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote; tensors are on the CPU.

        Raises:
            UnreadableFileError: ``path`` is missing, damaged, or holds another kind of result.
            UnavailableError: The library safetensors is not installed.

        """
        return _read(Path(path), cls.__name__, cls._restored)

    def _tensors(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self._LAYOUT}

    @classmethod
    def _restored(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Self:
        return cls(**tensors, **about)

    def _with(self, change: Callable[[Tensor], Any]) -> Any:
        names = [f.name for f in fields(self) if f.name not in self._LAYOUT]
        return replace(self, **{name: changed(getattr(self, name), change) for name in names})


def as_array(tensor: Tensor) -> Array:
    """Return ``tensor`` as a NumPy array; bfloat16, which NumPy lacks, as float32."""
    tensor = tensor.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.float().numpy()


def changed(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return ``value`` with every tensor in it changed; ``reduce`` may have nested them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: changed(one, change) for key, one in value.items()}
    if type(value) is list or isinstance(value, tuple):
        entries = [changed(one, change) for one in value]
        # A named tuple takes its entries one by one. Those of PyTorch, as of topk, do not.
        make: Callable[[list[Any]], Any] = getattr(value, "_make", type(value))
        return make(entries)
    return value


def _write(
    path: Path, kind: str, tensors: Mapping[str, object], about: Mapping[str, object]
) -> None:
    """Write ``tensors`` to ``path``, with ``kind`` and ``about`` as JSON in the metadata.

    Raises:
        InvalidInputError: Something in ``tensors`` is not a tensor.
        UnwritableOutputError: ``path`` cannot be written. The file appears whole or not at all.

    """
    metadata = {
        key: json.dumps(value, default=operator.index)
        for key, value in {"kind": kind, **about}.items()
    }
    own = {name: _of_its_own_memory(tensor) for name, tensor in tensors.items()}
    content = _imports.safetensors().torch.save(own, metadata)
    try:
        with atomic_file(path) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise UnwritableOutputError(
            f"a file that can be written at {path}",
            f"{type(error).__name__}: {error}",
            "Nothing was left there. Name another file, or make the folder or room in it.",
        ) from error


def _read(path: Path, kind: str, build: Callable[[dict[str, Tensor], dict[str, Any]], R]) -> R:
    """Return what ``build`` makes of the tensors and the metadata that ``_write`` wrote.

    Raises:
        UnreadableFileError: The file is missing, damaged or holds no ``kind``.

    """
    library = _imports.safetensors()
    try:
        check_is_file(path)
        with library.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = {key: _tuples(json.loads(value)) for key, value in metadata.items()}
        _check_kind(kind, about.pop("kind", kind))
        return build(tensors, about)
    except Exception as error:  # foreign bytes can make the reader raise anything
        raise UnreadableFileError(
            f"a file that {kind}.save wrote",
            f"{path} ({type(error).__name__}: {error})",
            "Name the .safetensors file itself.",
        ) from error


def _of_its_own_memory(tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise InvalidInputError(
            "weights as tensors",
            type(tensor).__name__,
            "Save before .numpy(), and let reduce return tensors.",
        )
    # safetensors refuses shared memory: rows of several layers may be views of one tensor.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _check_kind(wanted: str, found: object) -> None:
    if found != wanted:
        raise ValueError(f"it holds {found}")


def _tuples(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
