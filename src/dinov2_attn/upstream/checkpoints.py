"""Filling upstream's models with weights: a file of the user's or Meta's published one."""

from __future__ import annotations

import logging
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from dinov2_attn.errors import Unavailable, UnreadableFile
from dinov2_attn.upstream.network import brief

log = logging.getLogger(__name__)

PUBLISHED_AT = "https://dl.fbaipublicfiles.com/dinov2"
PUBLISHED_PATCH_SIZE = 14

# What parameters are saved in. Whole and complex numbers would become one of these in silence.
_FLOATING = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill ``model`` with a checkpoint in the format of upstream's hub: a plain state dict.

    Strict: a key that is missing or left over and a tensor of another shape or kind are errors.
    Raises ``UnreadableFile``, and then the model is as it was.
    """
    state = _read_state_dict(Path(path))
    differences = _differences(model.state_dict(), state)
    if differences:
        raise UnreadableFile(
            "a checkpoint that fits the model key by key",
            f"{path} with {'; '.join(differences)}",
            "Make --arch, --patch-size and --registers those of the checkpoint.",
        )
    model.load_state_dict(state)


def load_pretrained(model: nn.Module, arch: str, *, patch_size: int, registers: bool) -> None:
    """Fill ``model`` with the weights that Meta publishes for it.

    They are kept where torch.hub keeps checkpoints, so a file that ``torch.hub.load`` of
    upstream downloaded is found. Raises ``Unavailable`` if there are none or if they cannot
    be downloaded, and what ``load_weights`` raises.
    """
    if patch_size != PUBLISHED_PATCH_SIZE:
        raise Unavailable(
            f"patch size {PUBLISHED_PATCH_SIZE}, the only one with published weights",
            f"patch size {patch_size}",
            "Give your own with --weights PATH, or run without meaning with --random-weights.",
        )
    name = f"dinov2_{arch.replace('_', '')[:4]}{patch_size}"
    file = f"{name}_reg4_pretrain.pth" if registers else f"{name}_pretrain.pth"
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        _fill_and_keep(model, f"{PUBLISHED_AT}/{name}/{file}", path)
        return
    try:
        load_weights(model, path)
    except UnreadableFile as error:
        expected, found, _ = error.args
        raise UnreadableFile(
            expected, found, "The download may have been cut short: remove the file and run again."
        ) from error


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        found = "a directory" if path.is_dir() else "nothing"
        raise UnreadableFile(f"a checkpoint at {path}", found, "Name the .pth file itself.")
    try:
        _check_unpacked(path)
        _refuse_what_runs(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes at hand provoke
        reason = str(error).partition("\n")[0]
        raise UnreadableFile(
            "a complete file by torch.save that holds tensors only",
            f"{path}, which does not load ({type(error).__name__}: {reason})",
            "Download or save it again, as torch.save(model.state_dict(), path).",
        ) from error
    if not _is_state_dict(content):
        raise UnreadableFile(
            "a plain state dict, names to tensors, as upstream's hub publishes",
            f"{path}, which holds {_describe(content)}",
            "Save the state dict of the backbone alone: torch.save(model.state_dict(), path).",
        )
    # As a plain dict: what else an OrderedDict brings would be asked in place of its methods.
    return dict(dict.items(content))


def _check_unpacked(path: Path) -> None:
    """Raise unless reading ``path`` takes memory as its size says: torch compresses nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise zipfile.BadZipFile(f"its entries unpack to {unpacked:,} bytes")


def _refuse_what_runs(path: Path) -> None:
    """Raise ``ValueError`` for the two formats whose code ``weights_only`` lets through.

    PyTorch before 2.6 hands a TorchScript archive on to ``torch.jit.load``, which runs its
    ``__setstate__``, and unpacks the tar that PyTorch 0.1 wrote (CVE-2025-32434).
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    # PyTorch's reader and not Python's: a zip can be made in which the two see other files.
    if is_zip and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise ValueError("a TorchScript archive, which holds code")
    if tarfile.is_tarfile(path):
        raise ValueError("a tar, which PyTorch would unpack")


def _is_state_dict(content: object) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in dict.items(content)
    )


def _describe(content: object) -> str:
    if isinstance(content, dict):
        return f"a dict of {_some([str(key) for key in dict.keys(content)])}"
    return f"an object of type {type(content).__name__}"


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    reshaped = [
        f"{key} {tuple(found[key].shape)} for {tuple(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    odd = [
        f"{key} ({found[key].dtype}, {found[key].layout}, {found[key].device})"
        for key in expected
        if key in found and not _fits(found[key], expected[key])
    ]
    kinds = {
        "missing": [key for key in expected if key not in found],
        "left over": [key for key in found if key not in expected],
        "of another shape": reshaped,
        "of another kind": odd,
    }
    return [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in kinds.items() if keys]


def _fits(found: Tensor, expected: Tensor) -> bool:
    """Say whether ``found`` is dense, here and of numbers that ``expected`` is made of."""
    alike = found.dtype == expected.dtype or {found.dtype, expected.dtype} <= _FLOATING
    return alike and found.layout == torch.strided and found.device.type == "cpu"


def _some(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")


def _fill_and_keep(model: nn.Module, url: str, path: Path) -> None:
    """Download to beside ``path``, and move there what the model could be filled with."""
    log.info("downloading %s", url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # torch.hub takes a broken line for the end of the file.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder) / path.name
            with brief():
                torch.hub.download_url_to_file(url, str(file))
            load_weights(model, file)
            os.replace(file, path)
    except UnreadableFile as error:
        expected, found, _ = error.args
        raise UnreadableFile(
            expected, found, "Nothing was kept. The line may have broken: run again."
        ) from error
    except (OSError, HTTPException) as error:  # no network, a broken line, an unwritable cache
        raise Unavailable(
            f"the published weights {url}",
            f"{type(error).__name__}: {error}",
            "Give a file of yours with --weights PATH, or see the program run with "
            "--random-weights, whose maps carry no meaning.",
        ) from error
