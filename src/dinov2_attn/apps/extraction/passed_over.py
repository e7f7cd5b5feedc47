"""The files of a source that are no images, counted by suffix."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping

from dinov2_attn.apps.viz import dicom, videos
from dinov2_attn.apps.viz.opening import plugin_for, readable_suffixes
from dinov2_attn.errors import shown_name

# How many suffixes are listed. Some folders of data have one for each part.
NAMED = 10
LINKS = "links and devices"


def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the files in a folder that count as images, or as videos."""
    found = readable_suffixes() | {".mpo"}  # Pillow reads it as the JPEG at its start
    found |= dicom.SUFFIXES if dicom.is_readable() else set()
    return found | videos.SUFFIXES if videos.is_readable() else found


def suffix_of(name: str) -> str:
    """Return the suffix of a file in lower case, as ``".png"``; empty if it has none."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if len(suffix) > 1 else ""


def is_hidden(name: str) -> bool:
    """Return whether a file is skipped because its name begins with a dot."""
    return os.path.basename(name).startswith(".")


class Sieve:
    """Selects images by their names, and counts the other files."""

    def __init__(self) -> None:
        self._suffixes = image_suffixes()
        self._counts: Counter[str] = Counter()

    def takes(self, name: str, counted: bool = True) -> bool:
        """Return whether the file ``name`` is an image; count it if not."""
        if is_hidden(name):
            return False
        suffix = suffix_of(name)
        if counted and suffix not in self._suffixes:
            self.pass_over(suffix)
        return suffix in self._suffixes

    def pass_over(self, suffix: str) -> None:
        """Count one file that is not an image."""
        self._counts[suffix] += 1

    @property
    def passed_over(self) -> dict[str, int]:
        """How many files of each suffix were passed over, most first."""
        return dict(sorted(self._counts.items(), key=lambda one: (-one[1], one[0])))


def describe(passed_over: Mapping[str, int]) -> str:
    """Return a summary: ``passed over: 3 .mp4, 1 .txt, 2 without suffix``.

    Formats that a plug-in of Pillow reads are listed with the command that installs it.
    """
    # Formats that could be read come first, so that they are always listed.
    several = sorted(passed_over, key=lambda suffix: _needs(suffix) is None)
    said = [f"{passed_over[suffix]:,} {shown_name(_called(suffix))}" for suffix in several[:NAMED]]
    if rest := several[NAMED:]:
        said.append(f"{sum(passed_over[suffix] for suffix in rest):,} with {len(rest):,} others")
    return f"passed over: {', '.join(said)}"


def _needs(suffix: str) -> str | None:
    """Return the package that makes files of ``suffix`` readable, if there is one to install."""
    if suffix in videos.SUFFIXES and not videos.is_readable():
        return "av"
    if suffix in dicom.SUFFIXES and not dicom.is_readable():
        return dicom.PACKAGE
    return plugin_for(f"x{suffix}")


def _called(suffix: str) -> str:
    if suffix and (package := _needs(suffix)):
        return f"{suffix} (`pip install {package}` makes it readable)"
    return suffix or "without suffix"
