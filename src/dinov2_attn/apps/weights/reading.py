"""Reading a file of weights into named tensors. Code in the file is never run."""

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

from dinov2_attn import _imports
from dinov2_attn._compat import records_of_archive
from dinov2_attn.apps.weights.config_files import ModelConfig, find_config
from dinov2_attn.apps.weights.files import (
    CHECKPOINT,
    SAVE_AGAIN,
    files_of,
    refuse_others,
    some,
)
from dinov2_attn.apps.weights.pickles import refuse_long_names
from dinov2_attn.errors import InvalidInputError, UnreadableFileError

# Training checkpoints nest two or three dicts. Deeper dicts hold no weights.
_DEEPEST = 8


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a file: tensors by name, with the keys of nested dicts joined by dots.

    Attributes:
        path: The file, or a word for what was given in place of one.
        tensors: The tensors by name.
        others: The names of values that are not tensors.
        metadata: The metadata of a safetensors file.
        config: The content of the config file that belongs to it.

    """

    path: Path | str
    tensors: Mapping[str, Tensor]
    others: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: ModelConfig | None = None


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU: a file by ``torch.save`` or safetensors, or their folder.

    ``torch.load`` is called with ``weights_only``. TorchScript, tar archives and files that
    unpack to more than their size are rejected.

    Raises:
        UnreadableFileError: If this is not a checkpoint, or holds no named tensor.
        UnavailableError: If the library safetensors is needed and missing.

    """
    path = Path(path)
    try:
        files = files_of(path)
        parts = [_read_file(file) for file in files]
        config = find_config(files[0])
    except OSError as error:  # no permission, a disk that fails
        raise _refused(path, error) from error
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    others = tuple(name for part in parts for name in part.others)
    return _whole(Checkpoint(path, tensors, others, parts[0].metadata, config))


def read_mapping(mapping: Mapping[str, object]) -> Checkpoint:
    """Return the checkpoint of a mapping, such as a state dict, in place of a file."""
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
    except Exception as error:  # torch.load can raise anything
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
    """Allow ``argparse.Namespace`` for ``weights_only``: DINO v1 saves its options in one."""
    allowed = getattr(torch.serialization, "safe_globals", None)  # torch 2.5 and later
    return contextlib.nullcontext() if allowed is None else allowed([argparse.Namespace])


def _refused(path: Path, error: Exception) -> UnreadableFileError:
    text = str(error)
    if any(sign in text for sign in _SHARDS):
        return _shard(path)
    # PyTorch's own text is not passed on: it recommends loading without weights_only.
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


# In PyTorch's errors for shards: their module, or the function that rebuilds all of them.
_SHARDS = ("torch.distributed", "_rebuild_wrapper_subclass")

# How PyTorch's errors name other classes, in old and new versions and for blocked modules.
_CODE = re.compile(r"[Uu]nsupported (?:class|global:?(?: GLOBAL)?|GLOBAL) ([\w.]+)")


def _read_safetensors(path: Path) -> Checkpoint:
    library = _imports.safetensors()
    try:
        with library.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Checkpoint(path, tensors, metadata=file.metadata() or {})
    except Exception as error:  # the reader can raise anything
        raise UnreadableFileError(
            "a complete safetensors file",
            f"{path}, which does not load ({type(error).__name__}: {error})",
            f"Download it again. {SAVE_AGAIN}",
        ) from error


def _is_safetensors(path: Path) -> bool:
    """Return whether the suffix or the content is safetensors': a length, then a JSON header."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (
        start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    )


def _check_unpacked(path: Path) -> None:
    """Raise ``BadZipFile`` if the archive is compressed; torch's are not. It could fill memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise zipfile.BadZipFile(f"its entries unpack to {unpacked:,} bytes")


def _refuse_what_runs(path: Path) -> None:
    """Raise for TorchScript, whose code can run in spite of ``weights_only``, and for long names.

    PyTorch before 2.6 passes it to ``torch.jit.load``, which runs its ``__setstate__``. It also
    unpacks the tar files of PyTorch 0.1 (CVE-2025-32434), which ``refuse_others`` rejects.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    # PyTorch's reader: a crafted zip can show other files to Python's.
    records = records_of_archive(path) if is_zip else None
    refuse_long_names(path, records)
    if records is not None and "constants.pkl" in records:
        raise ValueError("a TorchScript archive, which holds code")


def _flatten(content: object) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of nested dicts by name, and the names of all other values."""
    tensors: dict[str, Tensor] = {}
    others: list[str] = []
    # Each dict once: a dict can contain itself.
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], object]] = [((), content)]
    while waiting:
        path, value = waiting.pop()
        name = ".".join(path)
        if isinstance(value, Tensor) and path and not value.is_nested:  # which has no shape
            # A second tensor of the same name is kept, so that it is reported as left over.
            tensors[name if name not in tensors else f"{name} (again)"] = value
        elif _has_names(value) and len(path) < _DEEPEST and id(value) not in seen:
            seen.add(id(value))
            # dict's own methods: an instance of OrderedDict can replace its own.
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
