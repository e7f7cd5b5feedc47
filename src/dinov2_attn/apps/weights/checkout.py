"""A checkout of upstream's code, recognised by its files; no torch."""

from __future__ import annotations

from pathlib import Path

from dinov2_attn.errors import UnreadableFileError

_UPSTREAM = Path("dinov2", "models", "vision_transformer.py")
_DINOV3 = Path("dinov3", "hub", "backbones.py")


def holds_models(folder: Path) -> bool:
    """Return whether ``folder`` is a checkout of DINOv2."""
    return (folder / _UPSTREAM).is_file()


def check(repo: str | Path, *, dinov3: bool = False) -> Path:
    """Return the absolute folder of a checkout of DINOv2, or of DINOv3.

    Raises:
        UnreadableFileError: If ``repo`` is none.

    """
    folder = Path(repo).expanduser().resolve()
    if dinov3 and not (folder / _DINOV3).is_file():
        raise UnreadableFileError(
            f"a checkout of DINOv3: a folder that holds {_DINOV3.as_posix()}",
            f"{folder}, which does not",
            "Name the folder that `git clone` made.",
        )
    if not dinov3 and not holds_models(folder):
        raise UnreadableFileError(
            f"a checkout of upstream: a folder that holds {_UPSTREAM.as_posix()}",
            f"{folder}, which does not",
            "Name the folder that `git clone` made.",
        )
    return folder
