"""Imports run down: a room imports only itself and the rooms that stand above it in ``ROOMS``."""

from __future__ import annotations

import ast
from pathlib import Path

import dinov2_attn

PACKAGE = Path(dinov2_attn.__file__).parent
NAME = PACKAGE.name
ROOMS = [
    *(
        "errors",
        "typing",
        "_compat",
        "_compat_imports",
        "_files",
        "_imports",
        "_locks",
        "_download",
    ),
    *("math", "kernels", "backbone", "history", "grafting", "maps"),
    "__init__",
    *("proof/conformance", "proof/verify"),
    *("apps/weights", "apps/viz", "apps/explorer", "apps/extraction", "apps/export"),
    "apps/training",
    *("apps/demo", "apps/cli"),
    *("viz", "__main__"),
]
FACES = {"__init__", "viz", "__main__"}  # these name applications, the first one lazily


def room(parts):
    """Return the room of a path below the package, and ``__init__`` for the package itself."""
    return "/".join(parts[: 1 + (parts[0] in ("apps", "proof"))]) if parts else "__init__"


def imports(tree):
    """Yield the parts of each dotted name below the package that ``tree`` imports anywhere."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{name}" for name in names]
        for package, *parts in (name.split(".") for name in names):
            if package == NAME:
                is_module = parts and (PACKAGE / parts[0]).with_suffix(".py").exists()
                is_folder = parts and (PACKAGE / parts[0]).is_dir()
                yield parts if is_module or is_folder else []


def test_imports_run_down():
    rank = {name: i for i, name in enumerate(ROOMS)}
    up = []
    for file in sorted(PACKAGE.rglob("*.py")):
        here = room(file.relative_to(PACKAGE).with_suffix("").parts)
        for parts in imports(ast.parse(file.read_text(encoding="utf-8"))):
            there = room(parts)
            if here not in FACES and rank[there] > rank[here]:
                up.append(f"{file.relative_to(PACKAGE)} imports {'.'.join(parts) or NAME}")
    assert not up, "\n".join(up)
