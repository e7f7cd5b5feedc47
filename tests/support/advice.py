"""What the tests of advice share: the table of cases, and every hint that the package holds."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dinov2_attn
from dinov2_attn import errors

PACKAGE = Path(dinov2_attn.__file__).parent
ERRORS = {
    name
    for name, cls in vars(errors).items()
    if isinstance(cls, type) and issubclass(cls, errors.Dinov2AttnError)
}


@dataclass(frozen=True)
class Case:
    """A call that fails, and the one that its hint leads to."""

    module: str
    snippet: str
    wrong: Callable[[Any], object]
    right: Callable[[Any], object]

    def __str__(self) -> str:
        return f"{self.module}: {self.snippet}"


@dataclass(frozen=True)
class Hint:
    """The next step of one construction of an error, as far as it is written there."""

    module: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.text}"


def hints() -> Iterator[Hint]:
    """Yield the hint of every error that the package constructs."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = str(path.relative_to(PACKAGE))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _name(node.func) in ERRORS:
                yield Hint(module, node.lineno, _hint(node, tree))


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def _hint(call: ast.Call, tree: ast.Module) -> str:
    """Return the constant parts of the third argument; of one made elsewhere, of that place."""
    assert len(call.args) == 3, ast.unparse(call)
    hint = call.args[2]
    found = _texts(hint)
    names = {node.id for node in ast.walk(hint) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            found += _texts(node)
        if isinstance(node, ast.Assign) and {_name(target) for target in node.targets} & names:
            found += _texts(node.value)
    return " … ".join(found) or ast.unparse(hint)


def _texts(tree: ast.AST) -> list[str]:
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [node.value for node in constants if isinstance(node.value, str)]
