"""An extension of Griffe, which reads docstrings for the site: Python and literal blocks as code.

Docstrings here show calls as ``>>> call()`` in running text, and literal blocks as after ``::``.
Markdown knows neither.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension, Object

CALLS = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent)(?:>>>|\.\.\.)(?: .*)?)*", re.M)
LITERAL = re.compile(r"::(?=\n\n +\S)")


class CodeInText(Extension):
    """Mark up the code in the docstrings of all objects."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Mark up one docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = marked_up(obj.docstring)


def marked_up(docstring: Docstring) -> str:
    """Return the text of a docstring with its calls in fences."""
    text = CALLS.sub(lambda found: _fenced(found[0], found["indent"]), docstring.value)
    return LITERAL.sub(":", text)


def _fenced(calls: str, indent: str) -> str:
    return f"\n{indent}```pycon\n{calls}\n{indent}```\n"
