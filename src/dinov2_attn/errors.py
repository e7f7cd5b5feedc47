"""Every error and warning a user can meet: expected, found, what to do next."""

from __future__ import annotations


class Dinov2AttnError(Exception):
    """The base of all errors of this package.

    It has three parts: ``expected``, ``found`` and a ``hint`` for the next step. They are the lines
    of ``str()``. ``args`` holds them, so that an error can be pickled by a worker process.
    """

    def __init__(self, expected: str, found: str, hint: str) -> None:
        super().__init__(expected, found, hint)

    @property
    def expected(self) -> str:
        """What was expected."""
        return str(self.args[0])

    @property
    def found(self) -> str:
        """What was found instead."""
        return str(self.args[1])

    @property
    def hint(self) -> str:
        """What to do next."""
        return str(self.args[2])

    def __str__(self) -> str:
        return shown(
            "\n".join(
                (
                    _sentence(f"Expected {self.expected}").replace("\n", "\\n"),
                    _sentence(f"Found {self.found}").replace("\n", "\\n"),
                    self.hint,
                )
            )
        )


def is_failure(error: BaseException) -> bool:
    """Return whether what was raised for one input is its failure, rather than the end of a run.

    The end is what no ``except Exception`` catches: ``KeyboardInterrupt``, ``SystemExit``, the
    ``CancelledError`` of asyncio, or what a handler of signals raises. A panic of a library in Rust
    is of that kind too, and is a failure.
    """
    return isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"


def in_one_line(error: BaseException) -> str:
    """Return the text of ``error`` as one line, for lists, tables and other errors."""
    text = str(error)
    if isinstance(error, Dinov2AttnError):
        text = f"expected {error.expected}; found {error.found}. {error.hint}"
    return " ".join(shown(text).splitlines())


def shown(text: str) -> str:
    """Return ``text`` as it may be shown: names in it may come from files of others.

    Letters that steer a terminal or turn the direction of text are escaped, and so are bytes that
    are no text. A line of more than 2,000 letters is shortened.
    """
    lines = (line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…" for line in text.split("\n"))
    return "\n".join("".join(map(_letter, line)) for line in lines)


def shown_name(name: object) -> str:
    """Return a name from outside as it may be shown: escaped, on one line, shortened inside."""
    text = str(name)
    if len(text) > _LONGEST_NAME:
        text = f"{text[: _LONGEST_NAME // 2]}…{text[-_LONGEST_NAME // 2 :]}"
    return "".join(map(_letter, text))


_LONGEST, _LONGEST_NAME = 2000, 200


def _letter(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


class IncompatibleUpstreamError(Dinov2AttnError, RuntimeError):
    """The classes do not compute the attention this package would return."""


class PatchedOnTopError(Dinov2AttnError, RuntimeError):
    """Another patch replaced a graft after it was set, so it cannot be undone safely."""


class NotGraftedError(Dinov2AttnError, RuntimeError):
    """The module that should return attention is not grafted."""


class NotRecordedError(Dinov2AttnError, RuntimeError):
    """A forward pass that should have been recorded was not, or not all of it."""


class NotEditedError(Dinov2AttnError, RuntimeError):
    """An edit that should have changed a forward pass did not reach it, or not all of it."""


class UnfaithfulError(Dinov2AttnError, RuntimeError):
    """Weights times values are not what the kernel returned."""


class NoOperatorError(Dinov2AttnError, NotImplementedError):
    """xFormers has no operator for the device of the attention."""


class InvalidInputError(Dinov2AttnError, ValueError):
    """An argument is of the wrong kind or shape."""


class OutOfRangeError(InvalidInputError, IndexError):
    """A layer, a query or a mask points outside of what there is."""


class UnavailableError(Dinov2AttnError, RuntimeError):
    """Code or weights could not be found or downloaded."""


class UnreadableFileError(Dinov2AttnError, RuntimeError):
    """A file given by the user is missing or is not what it should be."""


class UnwritableOutputError(Dinov2AttnError, RuntimeError):
    """A result could not be written, and no partial file was left."""


class KernelFallbackWarning(UserWarning):
    """xFormers has no operator for its inputs, so PyTorch's kernel is used."""


class UpstreamDriftWarning(UserWarning):
    """Upstream's code is of no known revision, and passed the proof."""


class SuspiciousArtifactsWarning(UserWarning):
    """Too many patches have outlier norms for these to be artifact tokens."""


class SuspiciousRangeWarning(UserWarning):
    """An image uses little of the range of its format, so its values may have another range."""


class NotDrawnWarning(UserWarning):
    """A picture of a training could not be drawn, and the training goes on without it."""
