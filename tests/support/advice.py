"""What the tests of advice share: tables of cases, and every hint that the package holds."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dinov2_attn
from dinov2_attn import errors

PACKAGE = Path(dinov2_attn.__file__).parent

# Folders in which each folder is an area of its own.
_ROOMS = ("apps", "proof")


@dataclass(frozen=True)
class Case:
    """A call that fails, and the one that its hint leads to. ``area`` is a folder."""

    area: str
    snippet: str
    wrong: Callable[[Any], object]
    right: Callable[[Any], object]

    def __str__(self) -> str:
        return f"{self.area}: {self.snippet}"


class Table(list[Case]):
    """The cases of some areas."""

    def add(
        self,
        area: str,
        snippet: str,
        wrong: Callable[[Any], object],
        right: Callable[[Any], object],
    ) -> None:
        """Append a case."""
        self.append(Case(area, snippet, wrong, right))


@dataclass(frozen=True)
class Hint:
    """The next step of one construction of an error, as far as it is written there."""

    module: str
    line: int
    text: str

    @property
    def area(self) -> str:
        """The folder that holds the module: ``maps``, ``apps/weights``."""
        parts = Path(self.module).with_suffix("").parts
        return "/".join(parts[: 2 if parts[0] in _ROOMS else 1])

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.text}"


def hints() -> list[Hint]:
    """Return the hint of every error that the package constructs."""
    trees = {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    classes = _error_classes(list(trees.values()))
    return [
        Hint(module, node.lineno, _hint(node, tree))
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _name(node.func) in classes
    ]


def unanswered(every: Sequence[Hint], known: Sequence[tuple[str, str]]) -> list[Hint]:
    """Return the hints without an entry of ``known`` of their own.

    An entry is an area and words of the hint. Where several hints have the same words, as many
    entries are needed. So an entry that is too short cannot answer for others.
    """
    taken: dict[int, Hint] = {}
    fitting = {
        hint: [
            i for i, (area, words) in enumerate(known) if area == hint.area and words in hint.text
        ]
        for hint in every
    }

    def place(hint: Hint, seen: set[int]) -> bool:
        for i in fitting[hint]:
            if i not in seen:
                seen.add(i)
                if i not in taken or place(taken[i], seen):
                    taken[i] = hint
                    return True
        return False

    return [hint for hint in every if not place(hint, set())]


def _error_classes(trees: Sequence[ast.Module]) -> set[str]:
    """Return the names of this package's errors, and of classes elsewhere that derive from them."""
    names = {
        name
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, errors.Dinov2AttnError)
    }
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and names & {_name(base) for base in node.bases}:
                names.add(node.name)
    return names


def _name(expression: ast.expr) -> str:
    return expression.id if isinstance(expression, ast.Name) else getattr(expression, "attr", "")


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
    # Of a hint that is handed in, all that its module says.
    return " … ".join(found or list(_texts(tree)))


def _texts(tree: ast.AST) -> list[str]:
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [node.value for node in constants if isinstance(node.value, str)]
