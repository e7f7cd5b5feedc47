"""The weights that Meta publishes: downloaded once, kept where torch.hub keeps them."""

from __future__ import annotations

import logging
from http.client import HTTPException
from pathlib import Path

import torch
from torch import nn

from dinov2_attn._download import download_url
from dinov2_attn._files import replacing
from dinov2_attn.apps.weights.checkpoints import load_checkpoint
from dinov2_attn.errors import UnavailableError, UnreadableFileError

log = logging.getLogger(__name__)

PUBLISHED_AT = "https://dl.fbaipublicfiles.com/dinov2"
PUBLISHED_PATCH_SIZE = 14


def load_pretrained(model: nn.Module, arch: str, *, patch_size: int, registers: bool) -> None:
    """Fill ``model`` with the weights that Meta publishes for it.

    They are kept where torch.hub keeps checkpoints, so a file that ``torch.hub.load`` of
    upstream downloaded is found. Raises ``UnavailableError`` if there are none or if they cannot
    be downloaded, and what ``load_checkpoint`` raises.
    """
    if patch_size != PUBLISHED_PATCH_SIZE:
        raise UnavailableError(
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
        load_checkpoint(model, path)
    except UnreadableFileError as error:
        raise UnreadableFileError(
            error.expected,
            error.found,
            "The download may have been cut short: remove the file and run again.",
        ) from error


def _fill_and_keep(model: nn.Module, url: str, path: Path) -> None:
    """Download to beside ``path``, and move there what the model could be filled with."""
    log.info("downloading %s", url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # torch.hub takes a broken line for the end of the file.
        with replacing(path) as file:
            download_url(url, file)
            load_checkpoint(model, file)
    except UnreadableFileError as error:
        raise UnreadableFileError(
            error.expected, error.found, "Nothing was kept. The line may have broken: run again."
        ) from error
    except (OSError, HTTPException) as error:  # no network, a broken line, an unwritable cache
        raise UnavailableError(
            f"the published weights {url}",
            f"{type(error).__name__}: {error}",
            "Give a file of yours with --weights PATH, or see the program run with "
            "--random-weights, whose maps carry no meaning.",
        ) from error
