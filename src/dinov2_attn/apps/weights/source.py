"""Upstream's code and Meta's weights: found on this machine, or downloaded.

``obtain`` looks for the code in a checkout, the environment, torch.hub's copy and PyPI's wheel.
Each way ends with ``import dinov2.models.vision_transformer``. A process can hold one ``dinov2``
only. If another one is already imported, Python would silently use that; here it is an error.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from dinov2_attn._download import Wheel, bounded_downloads, download_url, fetch_wheel
from dinov2_attn._files import atomic_file
from dinov2_attn.apps.weights import checkout
from dinov2_attn.apps.weights.checkpoints import load_checkpoint
from dinov2_attn.errors import Dinov2AttnError, UnavailableError, UnreadableFileError, in_one_line

log = logging.getLogger(__name__)

MODELS = "dinov2.models.vision_transformer"

DINOV2_WHEEL = Wheel(
    name="dinov2",
    version="0.0.1.dev2",
    sha256="d23754838b9d415233e1df1d5c2bf8f418d0e6654390f271ba46be389a5652cb",
)
LICENCE = (
    "using the wheel %s from PyPI: upstream's first commit (2023-04-17, without registers), "
    "uploaded by a third party, under that commit's licence CC-BY-NC 4.0: no commercial use. "
    "Upstream is Apache-2.0 today: --repo PATH uses a checkout of it instead"
)

PUBLISHED_AT = "https://dl.fbaipublicfiles.com/dinov2"
PUBLISHED_PATCH_SIZE = 14


@dataclass(frozen=True)
class Source:
    """Where the ``dinov2`` of this process came from."""

    kind: Literal["checkout", "installed", "hub", "pypi"]
    where: str

    def __str__(self) -> str:
        return f"upstream's code is {self.where} ({self.kind})"


def obtain(repo: str | Path | None = None) -> Source:
    """Make ``import dinov2.models.vision_transformer`` work in this process.

    Args:
        repo: A checkout of upstream. If given, no other source is tried. Otherwise the first of
            these is used: an importable ``dinov2``, torch.hub's copy from GitHub, the pinned wheel
            from PyPI.

    Returns:
        The source that was used.

    Raises:
        UnavailableError: If none of the ways works, with the reason of each.
        UnreadableFileError: If ``repo`` is not a checkout.

    """
    if repo is not None:
        return from_checkout(repo)
    reasons = []
    for way in (from_environment, from_hub, from_pypi):
        try:
            return way()
        except UnavailableError as error:
            reasons.append(f"no {error.expected} ({error.found})")
            log.debug("%s", reasons[-1])
    raise UnavailableError(
        "upstream's dinov2 code from one of three places",
        "; ".join(reasons),
        "Connect to GitHub or PyPI once, or name a checkout of "
        "github.com/facebookresearch/dinov2: --repo PATH, in Python obtain(PATH).",
    )


def from_checkout(repo: str | Path) -> Source:
    """Import ``dinov2`` from the folder ``repo``, in preference to an installed one.

    Raises:
        UnreadableFileError: If the folder is not a checkout.
        UnavailableError: If another ``dinov2`` is already imported, or the import fails.

    """
    folder = checkout.check(repo)
    _import_from(folder)
    return Source("checkout", str(folder))


def from_environment() -> Source:
    """Import the ``dinov2`` of this environment; raise ``UnavailableError`` if there is none."""
    _import_models("on the Python path")
    import dinov2

    return Source("installed", str(Path(dinov2.__file__).parent))


def from_hub() -> Source:
    """Import torch.hub's copy of GitHub's main branch; download it if there is none.

    An existing copy is used without the network, as ``torch.hub.load`` does.

    Raises:
        UnavailableError: If the download or the import fails.

    """
    # Every torch names the folder owner_name_ref. With the ref given, torch.hub does not ask
    # GitHub for the default branch.
    folder = Path(torch.hub.get_dir()) / "facebookresearch_dinov2_main"
    if not checkout.holds_models(folder):
        _download_from_hub("facebookresearch/dinov2:main")
    _import_from(folder)
    return Source("hub", str(folder))


def from_pypi() -> Source:
    """Import the pinned wheel, which is upstream's first commit, and log its licence.

    Raises:
        UnavailableError: If the wheel is not in the cache and cannot be downloaded.

    """
    wheel = fetch_wheel(DINOV2_WHEEL)
    _import_from(wheel)
    log.warning(LICENCE, DINOV2_WHEEL.requirement)
    return Source("pypi", str(wheel))


def load_pretrained(model: nn.Module, arch: str, *, patch_size: int, registers: bool) -> None:
    """Fill ``model`` with the weights that Meta publishes for it.

    The file is kept in torch.hub's folder of checkpoints. A file that ``torch.hub.load`` of
    upstream downloaded is used again.

    Args:
        model: One of upstream's models.
        arch: The name of its function upstream, such as ``vit_small``.
        patch_size: Its patch size in pixels.
        registers: Whether it has registers.

    Raises:
        UnavailableError: If there are no such weights, or they cannot be downloaded.
        UnreadableFileError: If the file is incomplete or does not fit ``model``.

    """
    if patch_size != PUBLISHED_PATCH_SIZE:
        raise UnavailableError(
            f"patch size {PUBLISHED_PATCH_SIZE}, the only one with published weights",
            f"patch size {patch_size}",
            "Give your own weights with --weights PATH. --random-weights runs without, but its "
            "maps mean nothing.",
        )
    name = f"dinov2_{arch.replace('_', '')[:4]}{patch_size}"
    file = f"{name}_reg4_pretrain.pth" if registers else f"{name}_pretrain.pth"
    load_published(f"{name}/{file}", partial(load_checkpoint, model))


def load_published(place: str, load: Callable[[Path], object]) -> None:
    """Let ``load`` read a file that Meta publishes, from torch.hub's folder or a download.

    Args:
        place: Where it is published, below the address of DINOv2.
        load: Reads the file at a path, and raises ``UnreadableFileError``.

    Raises:
        UnavailableError: If the file cannot be downloaded.
        UnreadableFileError: If it is incomplete, or ``load`` raises it.

    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / place.rpartition("/")[2]
    if not path.is_file():
        _download_and_load(f"{PUBLISHED_AT}/{place}", path, load)
        return
    try:
        load(path)
    except UnreadableFileError as error:
        raise UnreadableFileError(
            error.expected,
            error.found,
            "The download may be incomplete. Remove the file and run again.",
        ) from error


def _download_and_load(url: str, path: Path, load: Callable[[Path], object]) -> None:
    """Download ``url``, ``load`` it, and keep it at ``path`` if that works."""
    log.info("downloading %s", url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # torch.hub does not notice a connection that breaks; loading does.
        with atomic_file(path) as file:
            download_url(url, file)
            load(file)
    except UnreadableFileError as error:
        raise UnreadableFileError(
            error.expected,
            error.found,
            "The partial download was deleted. Check your connection and run again.",
        ) from error
    except (OSError, HTTPException) as error:  # no network, a broken connection, no write access
        raise UnavailableError(
            f"the published weights {url}",
            f"{type(error).__name__}: {error}",
            "Give your own weights with --weights PATH. --random-weights runs without, but its "
            "maps mean nothing.",
        ) from error


def _download_from_hub(github: str) -> None:
    # torch.hub.list is the only public call that downloads without building a model. trust_repo
    # avoids a question on stdin (torch itself trusts this owner), skip_validation a request to
    # GitHub's rate-limited API.
    download: Callable[..., object] = torch.hub.list
    said = io.StringIO()  # torch.hub writes to standard error, not to a log
    try:
        with contextlib.redirect_stderr(said), bounded_downloads():
            download(github, trust_repo=True, skip_validation=True)
    except Exception as error:  # errors of network, archive and hubconf pass through torch.hub
        raise UnavailableError(
            "copy of GitHub's through torch.hub", _name_and_text(error), "Connect to GitHub."
        ) from error
    finally:
        log.debug("torch.hub: %s", said.getvalue().strip())


def _import_from(entry: Path) -> None:
    """Import upstream from ``entry``, a folder or a wheel, which stays on ``sys.path``."""
    _require_no_other(entry)
    # First, and permanently: worker processes need this path to unpickle models.
    sys.path.insert(0, str(entry))
    try:
        _import_models(f"at {entry}")
    except BaseException:
        sys.path.remove(str(entry))
        raise


def _require_no_other(entry: Path) -> None:
    imported = sys.modules.get("dinov2")
    if imported is None:
        return
    # A folder without __init__.py can be imported too, and has no __file__.
    found = Path(imported.__file__ or next(iter(imported.__path__))).resolve()
    if found != (entry / "dinov2" / "__init__.py").resolve():
        raise UnavailableError(
            f"dinov2 of {entry}",
            f"this process has imported {found} already",
            "Choose the source before dinov2 is imported, in a new process.",
        )


def _import_models(place: str) -> None:
    before = set(sys.modules)
    try:
        importlib.import_module(MODELS)
    except Exception as error:  # upstream's code runs here and can raise anything
        # A partial import must not remain as the dinov2 of this process.
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "dinov2":
                del sys.modules[name]
        if isinstance(error, Dinov2AttnError):
            raise
        raise UnavailableError(
            f"importable dinov2 {place}", _name_and_text(error), "Fix or replace it."
        ) from error


def _name_and_text(error: Exception) -> str:
    return f"{type(error).__name__}: {in_one_line(error)}"
