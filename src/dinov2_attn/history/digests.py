"""Digests of functions that depend on their code alone.

Comments, docstrings, positions and formatting make no difference. Nor does the version of Python:
``ast.dump`` and ``ast.unparse`` change between versions, so the tree is walked here.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import linecache
from collections.abc import Iterable, Iterator
from types import FunctionType
from weakref import WeakKeyDictionary

# Redundant (ctx), notation (kind) or a comment (type_comment): no part of what code does.
_SKIPPED = {"ctx", "kind", "type_comment"}

_Function = (ast.FunctionDef, ast.AsyncFunctionDef)

# Read once, at the first request. A file that is replaced later (torch.hub does that) is no longer
# the source of what was imported from it.
_MET: WeakKeyDictionary[FunctionType, str | None] = WeakKeyDictionary()


def digest_of(function: object) -> str | None:
    """Return the digest of a live function, ``None`` if its source cannot be read."""
    if not isinstance(function, FunctionType):  # compiled, or an object with a __call__
        return None
    if function not in _MET:
        _MET[function] = _read(function)
    return _MET[function]


def digests_in(source: str, names: Iterable[str]) -> dict[str, str]:
    """Return the digests of those of ``names`` that the module text ``source`` defines.

    Names are ``function`` or ``Class.method``. Nothing is imported or executed.
    """
    defined = dict(_definitions(ast.parse(source)))
    return {name: _hash(_canonical(defined[name])) for name in names if name in defined}


def _definitions(
    tree: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[str, ast.AST]]:
    for node in tree.body:
        if isinstance(node, _Function):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{prefix}{node.name}.")


def _read(function: FunctionType) -> str | None:
    inner = inspect.unwrap(function)
    if inner is not function and isinstance(inner, FunctionType):
        node = _parse(_source(inner))
        # Below upstream's own decorator its function is the code; below a patch it is not.
        if isinstance(node, _Function) and node.decorator_list:
            return _hash(_canonical(node))
    return _digest_unwrapped(function)


def _digest_unwrapped(function: FunctionType) -> str | None:
    source, name = _source(function), function.__code__.co_name
    if name == "<lambda>" and source:  # its lines are a piece of something, at best
        return _hash(source)
    node = _parse(source)
    # Other code at these lines: the file was replaced before the first request.
    return _hash(_canonical(node)) if isinstance(node, _Function) and node.name == name else None


def _source(function: FunctionType) -> str:
    """Return the lines of ``function``, or an empty text.

    As ``inspect.getsource``, but by the loader in the function's own globals. So a module in a zip
    file that has left ``sys.modules`` is still found.
    """
    code = function.__code__
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, function.__globals__)
    return "".join(inspect.getblock(lines[code.co_firstlineno - 1 :]))


def _parse(source: str) -> ast.stmt | None:
    # A method is indented; dedenting it would change strings of several lines.
    indented = source[:1].isspace()
    try:
        (node,) = ast.parse(f"if True:\n{source}" if indented else source).body
    except (SyntaxError, ValueError):
        return None
    return node.body[0] if indented and isinstance(node, ast.If) else node


def _canonical(node: object) -> str:
    """Return a tree as text that is the same on every Python.

    New fields (``type_params``) are empty in older code, and empty fields are left out. In lists
    ``None`` is kept: ``{**a, b: c}``, keyword-only defaults.
    """
    if isinstance(node, ast.AST):
        fields = [(n, v) for n, v in _fields(node) if n not in _SKIPPED and v not in (None, [])]
        written = ",".join(f"{name}={_canonical(value)}" for name, value in fields)
        return f"{type(node).__name__}({written})"
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    return ascii(node)  # repr depends on the version's Unicode tables


def _fields(node: ast.AST) -> Iterator[tuple[str, object]]:
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, (*_Function, ast.ClassDef)):
            docstring = ast.get_docstring(node)
            yield name, node.body if docstring is None else node.body[1:]
        elif isinstance(node, ast.JoinedStr):
            # Python 3.12 ends a format such as f"{x:>{width}}" with an empty string.
            yield name, [part for part in node.values if getattr(part, "value", None) != ""]
        else:
            yield name, value


def _hash(text: str) -> str:
    """Return sixteen digits: enough to distinguish functions, short enough for a table."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
