"""Private names of torch are used in one file, those of the import system in another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dinov2_attn

PACKAGE = Path(dinov2_attn.__file__).parent
FOREIGN = {"torch", "nn", "forward_ad", "importlib", "threading", "inspect"}


def private_names(source):
    """Yield the private names of ``FOREIGN`` modules, and of any module ``_modules``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(name.startswith("_") for name in names):
                yield ".".join(names)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            foreign = isinstance(root, ast.Name) and root.id in FOREIGN
            if (foreign or node.attr == "_modules") and not node.attr.endswith("__"):
                yield ast.unparse(node)


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._get_tracing_state()",
        "forward_ad._current_level",
        "importlib._bootstrap",
        "from torch.utils._python_dispatch import _disable_current_modes",
        "module._modules",
    ],
)
def test_a_private_name_is_found(line):
    assert list(private_names(line))


def test_private_names_are_in_compat_files_only():
    found = {
        f"{file.relative_to(PACKAGE)}: {name}"
        for file in PACKAGE.rglob("*.py")
        if file.name not in ("_compat.py", "_compat_imports.py")
        for name in private_names(file.read_text())
    }
    assert not found
