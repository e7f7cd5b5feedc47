"""Every error and warning a user can meet: expected, found, what to do next."""

from __future__ import annotations


class Dinov2AttnError(Exception):
    """The base of all errors of this package.

    What was ``expected``, what was ``found`` and a ``hint`` what to do next, which are the three
    lines of ``str()``. They are kept in ``args``, so that an error survives pickling on its way
    out of a worker process.
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
        return "\n".join(
            (_sentence(f"Expected {self.expected}"), _sentence(f"Found {self.found}"), self.hint)
        )


def in_one_line(error: BaseException) -> str:
    """Return what ``error`` says as one line, for lists, tables and other errors."""
    text = str(error)
    if isinstance(error, Dinov2AttnError):
        text = f"expected {error.expected}; found {error.found}. {error.hint}"
    return " ".join(text.splitlines())


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


class IncompatibleUpstreamError(Dinov2AttnError, RuntimeError):
    """The classes at hand do not compute the attention this package would return."""


class PatchedOnTopError(Dinov2AttnError, RuntimeError):
    """Somebody replaced a graft after it was set, so it cannot be undone safely."""


class NotGraftedError(Dinov2AttnError, RuntimeError):
    """Attention was asked of a module that ``install`` has not reached."""


class NotRecordedError(Dinov2AttnError, RuntimeError):
    """A forward pass that should have been recorded was not, or not all of it."""


class NoOperatorError(Dinov2AttnError, NotImplementedError):
    """xFormers has no operator for the device that attention was asked for on."""


class InvalidInputError(Dinov2AttnError, ValueError):
    """An argument is of the wrong kind or shape."""


class OutOfRangeError(InvalidInputError, IndexError):
    """A layer, a query or a mask points outside of what there is."""


class UnavailableError(Dinov2AttnError, RuntimeError):
    """Code or weights could not be had in any of the ways that were tried."""


class UnreadableFileError(Dinov2AttnError, RuntimeError):
    """A file given by the user is missing or is not what it should be."""


class UnwritableOutputError(Dinov2AttnError, RuntimeError):
    """A result could not be written; nothing half-written was left behind."""


class KernelFallbackWarning(UserWarning):
    """xFormers has no operator for what it is given, so PyTorch's kernel is used."""


class UpstreamDriftWarning(UserWarning):
    """Upstream's code is none that is known here, and holds all the same."""


class SuspiciousArtifactsWarning(UserWarning):
    """So many patches have outlying norms that something else than artifacts is going on."""


class SuspiciousRangeWarning(UserWarning):
    """An image uses so little of the range of its format that the format may not tell it."""
