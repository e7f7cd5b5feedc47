"""What a picture was made from: a record in a folder, and words inside of PNG, SVG and PDF."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2_attn import __version__
from dinov2_attn.errors import UnreadableFileError, UnwritableOutputError, shown_name

PROGRAM = f"dinov2-attn {__version__}"
RECORD = "run.json"

# Plain values of JSON by name.
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Origin:
    """An image and its digest.

    Attributes:
        name: The path of the image, or what else it is called.
        sha256: The digest of its file, or of its pixels if it has none.

    """

    name: str
    sha256: str

    def facts(self) -> dict[str, str]:
        """Return it as values of JSON."""
        return {"image": self.name, "sha256": self.sha256}


def origin_of(path: Path) -> Origin:
    """Return the image at ``path`` with the digest of its file.

    Raises:
        UnreadableFileError: if the file cannot be read.

    """
    try:
        return Origin(str(path), digest_of(path))
    except OSError as error:
        raise UnreadableFileError(
            "an image file",
            f"{path}, which cannot be read ({type(error).__name__}: {error})",
            "Check the path and that an image viewer opens it.",
        ) from error


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# Inside of pictures


def metadata_for(kind: str, facts: Facts) -> dict[str, Any]:
    """Return what matplotlib writes into a PNG, SVG or PDF, without a date.

    The title is for people. The description (in PDF the subject) is JSON in ASCII.

    Args:
        kind: ``png``, ``svg`` or ``pdf``.
        facts: The model, image, digest, layer and query, as far as they are known.

    """
    title, text = _title(facts), as_text(facts)
    match kind:
        case "svg":
            return {"Date": None, "Creator": PROGRAM, "Title": title, "Description": text}
        case "pdf":
            return {"CreationDate": None, "Creator": PROGRAM, "Title": title, "Subject": text}
    return {"Software": PROGRAM, "Title": title, "Description": text}


def as_text(facts: Facts) -> str:
    """Return ``facts`` and the version of this package as JSON in ASCII."""
    return json.dumps({"program": PROGRAM, **facts})


def _title(facts: Facts) -> str:
    parts = [f"{name} {facts[name]}" for name in ("query", "layer") if name in facts]
    images = facts.get("image", [])
    named = [images] if isinstance(images, str) else list(images)
    kind = "Relevance" if "target" in facts else "Attention"
    return ", ".join(
        [kind, *map(shown_name, parts), *(shown_name(Path(name).name) for name in named)]
    )


# In a folder


def record_of(command: str, origins: Sequence[Origin], model: str, options: Facts) -> Facts:
    """Return what a record says of a run, without its files, as it is read again."""
    facts = {
        "program": PROGRAM,
        "command": command,
        "images": [origin.facts() for origin in origins],
        "model": model,
        "options": dict(options),
    }
    return dict(json.loads(json.dumps(facts)))


def write_record(path: Path, record: Facts, files: Iterable[Path]) -> None:
    """Write ``record`` as JSON, with the digest of each of its ``files``."""
    digests = {file.name: digest_of(file) for file in sorted(files)}
    path.write_text(json.dumps({**record, "files": digests}, indent=1) + "\n", encoding="ascii")


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record at ``path``, or ``None`` if there is none.

    Raises:
        UnwritableOutputError: if it is something else.

    """
    if not path.exists():
        return None
    try:
        if path.is_file():  # a pipe might never end
            record = json.loads(path.read_text(encoding="utf-8"))
            if _is_record(record):
                return dict(record)
    except (OSError, ValueError, RecursionError):
        pass
    raise UnwritableOutputError(
        f"a record of a run of dinov2-attn at {path}",
        "another file",
        "Name another output, or move that file.",
    )


def files_of_older_run(folder: Path, record: str, new: Iterable[str]) -> list[str]:
    """Return the files in ``folder`` of the run that wrote ``record``, but for the ``new`` names.

    Raises:
        UnwritableOutputError: if one of them has changed since, or the record is another file.

    """
    known = (read_record(folder / record) or {}).get("files", {})
    old = [name for name in known if name not in set(new) and (folder / name).is_file()]
    changed = [name for name in old if digest_of(folder / name) != known[name]]
    if changed:
        raise UnwritableOutputError(
            f"files in {folder} as the last run wrote them, to remove them",
            f"{', '.join(changed)}, changed since",
            "Name another folder, or move what you changed.",
        )
    return old


def _is_record(value: Any) -> bool:
    """Return whether ``value`` is a record whose files are plain names."""
    files = value.get("files") if isinstance(value, dict) else None
    return (
        isinstance(files, dict)
        and str(value.get("program", "")).startswith("dinov2-attn ")
        and all(name not in ("", ".", "..") and Path(name).name == name for name in files)
    )
