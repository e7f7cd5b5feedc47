"""Getting upstream's code: a checkout, what is installed, torch.hub's copy, PyPI's wheel.

Every way ends in ``import dinov2.models.vision_transformer``. One process holds one
``dinov2``, the first that is imported: a checkout that comes too late is an error here,
where Python would go on with the other revision and say nothing.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dinov2_attn._download import Wheel, bounded_downloads, fetch_wheel
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
    "Upstream is Apache-2.0 today: --repo PATH takes a checkout of it instead"
)


@dataclass(frozen=True)
class Source:
    """Where the ``dinov2`` of this process came from."""

    kind: Literal["checkout", "installed", "hub", "pypi"]
    where: str

    def __str__(self) -> str:
        return f"upstream's code is {self.where} ({self.kind})"


def obtain(repo: str | Path | None = None) -> Source:
    """Make ``import dinov2.models.vision_transformer`` work in this process and say how.

    A checkout named by ``repo`` is used or refused, never passed over. Without one: what
    is importable, else torch.hub's copy from GitHub, else the pinned wheel from PyPI.
    Raises ``UnavailableError`` with the reason of each way that failed.
    """
    if repo is not None:
        return from_checkout(repo)
    reasons = []
    for way in (from_environment, from_hub, from_pypi):
        try:
            return way()
        except UnavailableError as error:
            reasons.append(f"no {error.expected} ({error.found})")
            log.info("%s", reasons[-1])
    raise UnavailableError(
        "upstream's dinov2 code from one of three places",
        "; ".join(reasons),
        "Connect to GitHub or PyPI once, or name a checkout of "
        "github.com/facebookresearch/dinov2: --repo PATH, in Python obtain(PATH).",
    )


def from_checkout(repo: str | Path) -> Source:
    """Import ``dinov2`` from the folder ``repo``, ahead of an installed one.

    Raises ``UnreadableFileError`` if the folder is no checkout and ``UnavailableError`` if another
    ``dinov2`` is imported already or if this one fails to import.
    """
    folder = Path(repo).expanduser().resolve()
    if not _holds_models(folder):
        raise UnreadableFileError(
            "a checkout of upstream: a folder that holds dinov2/models/vision_transformer.py",
            f"{folder}, which does not",
            "Name the folder that `git clone` made.",
        )
    _import_from(folder)
    return Source("checkout", str(folder))


def from_environment() -> Source:
    """Import the ``dinov2`` that Python finds by itself, or raise ``UnavailableError``."""
    _import_models("on the Python path")
    import dinov2

    return Source("installed", str(Path(dinov2.__file__).parent))


def from_hub() -> Source:
    """Import torch.hub's copy of GitHub's main branch, downloaded if need be.

    A copy that is there already is used as it is, without the network, as
    ``torch.hub.load`` does. Raises ``UnavailableError``.
    """
    # Named owner_name_ref by every torch; with the ref given, torch.hub asks GitHub nothing
    # before it downloads.
    folder = Path(torch.hub.get_dir()) / "facebookresearch_dinov2_main"
    if not _holds_models(folder):
        _download_from_hub("facebookresearch/dinov2:main")
    _import_from(folder)
    return Source("hub", str(folder))


def from_pypi() -> Source:
    """Import the pinned wheel, upstream's first commit, and announce its licence.

    Raises ``UnavailableError`` if the wheel can neither be downloaded nor found in the cache.
    """
    wheel = fetch_wheel(DINOV2_WHEEL)
    _import_from(wheel)
    log.warning(LICENCE, DINOV2_WHEEL.requirement)
    return Source("pypi", str(wheel))


def _holds_models(folder: Path) -> bool:
    return (folder / "dinov2" / "models" / "vision_transformer.py").is_file()


def _download_from_hub(github: str) -> None:
    # Listing is torch.hub's only public call that downloads and builds no model. Upstream's
    # owner is on torch's own list of trusted ones, and main is no fork's commit: the first
    # question would go to stdin, the second to GitHub's limited API.
    download: Callable[..., object] = torch.hub.list
    try:
        with bounded_downloads():
            download(github, trust_repo=True, skip_validation=True)
    except Exception as error:  # torch.hub passes on what network, archive and hubconf raise
        raise UnavailableError(
            "copy of GitHub's through torch.hub", _in_words(error), "Connect to GitHub."
        ) from error


def _import_from(entry: Path) -> None:
    """Import upstream from ``entry``, a folder or a wheel, which stays on ``sys.path``."""
    _require_no_other(entry)
    # Ahead of the others, and for good: worker processes unpickle models with this path.
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
    # A folder without __init__.py is imported too, and is no file.
    found = Path(imported.__file__ or next(iter(imported.__path__))).resolve()
    if found != (entry / "dinov2" / "__init__.py").resolve():
        raise UnavailableError(
            f"dinov2 of {entry}",
            f"this process has imported {found} already",
            "Choose before dinov2 is imported, in a new process.",
        )


def _import_models(place: str) -> None:
    before = set(sys.modules)
    try:
        importlib.import_module(MODELS)
    except Exception as error:  # upstream's code runs here and can raise anything
        # Half an import would pass for the dinov2 of this process.
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "dinov2":
                del sys.modules[name]
        if isinstance(error, Dinov2AttnError):
            raise
        raise UnavailableError(
            f"importable dinov2 {place}", _in_words(error), "Mend or replace it."
        ) from error


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {in_one_line(error)}"
