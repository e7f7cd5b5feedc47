"""Reading a file of weights into named tensors, running nothing that it may hold."""

from __future__ import annotations

import argparse
import contextlib
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from dinov2_attn import _optional
from dinov2_attn._compat import records_of_archive
from dinov2_attn.apps.weights.folders import files_of, some
from dinov2_attn.apps.weights.kinds import CHECKPOINT, SAVE_AGAIN, refuse_others
from dinov2_attn.apps.weights.stated import Stated, beside
from dinov2_attn.errors import InvalidInputError, UnreadableFileError

# Training checkpoints nest two or three dicts; what is deeper is no name of a weight.
_DEEPEST = 8


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file holds: tensors by their names, those of nested dicts joined by dots.

    ``others`` names what is no tensor. ``metadata`` is that of a safetensors file, and
    ``stated`` what a file beside it says.
    """

    path: Path | str
    tensors: Mapping[str, Tensor]
    others: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    stated: Stated | None = None


def read(path: str | Path) -> Checkpoint:
    """Read a file by ``torch.save`` or a safetensors file, or a folder of them, onto the CPU.

    ``weights_only`` always, and never TorchScript, a tar or what unpacks to more than its
    size. Raises ``UnreadableFileError`` if it is none or holds no tensor with a name, and
    ``UnavailableError`` for safetensors without their library.
    """
    path = Path(path)
    try:
        files = files_of(path)
        parts = [_read_file(file) for file in files]
        stated = beside(files[0])
    except OSError as error:  # no permission, a disk that fails
        raise _refused(path, error) from error
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    others = tuple(name for part in parts for name in part.others)
    return _whole(Checkpoint(path, tensors, others, parts[0].metadata, stated))


def read_mapping(mapping: Mapping[str, object]) -> Checkpoint:
    """Take what a checkpoint file holds, such as a state dict, in the place of the file."""
    tensors, others = _flatten(dict(mapping))
    if not tensors:
        raise InvalidInputError(
            "a mapping of names to tensors, nested or not",
            _describe(dict(mapping)),
            "Pass model.state_dict().",
        )
    return _whole(Checkpoint("the mapping", tensors, others))


def _whole(checkpoint: Checkpoint) -> Checkpoint:
    if any(_is_shard(*item) for item in checkpoint.tensors.items()):
        raise _shard(checkpoint.path)
    return checkpoint


def _read_file(path: Path) -> Checkpoint:
    if _is_safetensors(path):
        return _read_safetensors(path)
    refuse_others(path)
    return _read_saved(path)


def _read_saved(path: Path) -> Checkpoint:
    try:
        _check_unpacked(path)
        _refuse_what_runs(path)
        with _namespaces():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes at hand provoke
        raise _refused(path, error) from error
    tensors, others = _flatten(content)
    if not tensors:
        raise UnreadableFileError(
            "a checkpoint: names to tensors, in nested dicts or not",
            f"{path}, which holds {_describe(content)}",
            "Save a state dict: torch.save(model.state_dict(), path).",
        )
    return Checkpoint(path, tensors, others)


def _namespaces() -> contextlib.AbstractContextManager[object]:
    """Let ``weights_only`` read ``argparse.Namespace``: DINO v1 saves its options along."""
    allowed = getattr(torch.serialization, "safe_globals", None)  # torch 2.5 and later
    return contextlib.nullcontext() if allowed is None else allowed([argparse.Namespace])


def _refused(path: Path, error: Exception) -> UnreadableFileError:
    text = str(error)
    if any(sign in text for sign in _SHARDS):
        return _shard(path)
    # PyTorch's own words are not passed on: they advise to load without weights_only.
    reason, next_step = type(error).__name__, f"Download it again. {SAVE_AGAIN}"
    if isinstance(error, (OSError, zipfile.BadZipFile)):
        reason = f"{reason}: {text.partition(chr(10))[0]}"
    if code := _CODE.search(text):
        reason = f"it holds an object of {code[1]}, and reading it would run code"
        next_step = SAVE_AGAIN
    return UnreadableFileError(
        f"{CHECKPOINT}, complete, of tensors and plain data",
        f"{path}, which does not load ({reason})",
        next_step,
    )


# How PyTorch refuses the classes of shards, by their module or by what all of them call.
_SHARDS = ("torch.distributed", "_rebuild_wrapper_subclass")

# How it names all else: in its oldest and in its newest words, and of a module that it blocks.
_CODE = re.compile(r"[Uu]nsupported (?:class|global:?(?: GLOBAL)?|GLOBAL) ([\w.]+)")


def _read_safetensors(path: Path) -> Checkpoint:
    library = _optional.safetensors()
    try:
        with library.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Checkpoint(path, tensors, metadata=file.metadata() or {})
    except Exception as error:  # the reader raises whatever foreign bytes provoke
        raise UnreadableFileError(
            "a complete safetensors file",
            f"{path}, which does not load ({type(error).__name__}: {error})",
            f"Download it again. {SAVE_AGAIN}",
        ) from error


def _is_safetensors(path: Path) -> bool:
    """Go by the suffix, and by the content: the length of a header in JSON, then the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (
        start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    )


def _check_unpacked(path: Path) -> None:
    """Raise unless reading ``path`` takes memory as its size says: torch compresses nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise zipfile.BadZipFile(f"its entries unpack to {unpacked:,} bytes")


def _refuse_what_runs(path: Path) -> None:
    """Raise ``ValueError`` for TorchScript, whose code ``weights_only`` lets through.

    PyTorch before 2.6 hands it on to ``torch.jit.load``, which runs its ``__setstate__``, and
    unpacks the tar that PyTorch 0.1 wrote (CVE-2025-32434), which ``refuse_others`` refuses.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    # PyTorch's reader and not Python's: a zip can be made in which the two see other files.
    if is_zip and "constants.pkl" in records_of_archive(path):
        raise ValueError("a TorchScript archive, which holds code")


def _flatten(content: object) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors in nested dicts with names as keys, and the names of all else."""
    tensors: dict[str, Tensor] = {}
    others: list[str] = []
    # Each dict once: a file can hold one inside itself.
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], object]] = [((), content)]
    while waiting:
        path, value = waiting.pop()
        name = ".".join(path)
        if isinstance(value, Tensor) and path and not value.is_nested:  # which has no shape
            # A second of the same name stays visible, as one that nothing asks for.
            tensors[name if name not in tensors else f"{name} (again)"] = value
        elif _has_names(value) and len(path) < _DEEPEST and id(value) not in seen:
            seen.add(id(value))
            # Its own methods and not what an OrderedDict brings along in their place.
            waiting += [((*path, key), inner) for key, inner in reversed([*dict.items(value)])]
        elif path:
            others.append(name)
    return tensors, tuple(others)


def _has_names(value: object) -> TypeGuard[dict[str, object]]:
    return isinstance(value, dict) and all(isinstance(key, str) for key in dict.keys(value))


def _is_shard(name: str, tensor: Tensor) -> bool:
    return "_flat_param" in name or type(tensor).__module__.startswith("torch.distributed")


def _shard(path: Path | str) -> UnreadableFileError:
    return UnreadableFileError(
        "a checkpoint with each parameter whole, under its own name",
        f"{path}, one process's shard of a model under FSDP (such as model_*.rank_*.pth)",
        "Take the teacher_checkpoint.pth that upstream's training writes at each evaluation, "
        "or load all shards in the training code and save there under "
        "FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT).",
    )


def _describe(content: object) -> str:
    if isinstance(content, dict):
        keys = [str(key) for key in dict.keys(content)]
        return f"a dict of {some(keys)}" if keys else "an empty dict"
    return f"an object of type {type(content).__name__}"
