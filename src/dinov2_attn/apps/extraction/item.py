"""One image of a source, and its bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from dinov2_attn.errors import UnreadableFileError


@dataclass(frozen=True)
class Item:
    """One image of a source.

    ======  ====================================================================
    source  the name of the folder, list or tar
    path    the image's path in there, as a list has it, parts joined by ``/``
    file    the file with its bytes: the image itself, or the tar; empty for an item of
            a dataset
    place   offset and length of the image in a tar
    ======  ====================================================================
    """

    source: str
    path: str
    file: str
    place: tuple[int, int] | None = None

    def check(self) -> None:
        """Raise ``UnreadableFileError`` for what is no file: a pipe is waited for forever."""
        if os.path.exists(self.file) and not os.path.isfile(self.file):
            raise UnreadableFileError(
                "a file that can be read",
                f"{self.path}, which is a pipe, a device or a folder",
                "Leave it out of the source.",
            )

    def read(self) -> bytes:
        """Return the bytes of the image. Raises ``UnreadableFileError``."""
        try:
            with open(self.file, "rb") as file:
                if self.place is None:
                    return file.read()
                file.seek(self.place[0])
                return file.read(self.place[1])
        except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
            reason = getattr(error, "strerror", None) or error
            raise UnreadableFileError(
                "a file that can be read",
                f"{self.path} ({type(error).__name__}: {reason})",
                "Check the path and who may read it.",
            ) from error
