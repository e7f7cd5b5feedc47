"""Audit the models of a copy: ``python -m … FOLDER PACKAGE RESULT``, a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dinov2_attn.backbone.structure import Role
from dinov2_attn.errors import in_one_line
from dinov2_attn.proof.conformance.building import AttentionCase, ModelCase
from dinov2_attn.proof.conformance.code import Code
from dinov2_attn.proof.conformance.loading import load
from dinov2_attn.proof.verify.audit import audit
from dinov2_attn.proof.verify.findings import Audit, Finding

# Small, and all sizes differ, so that no recipe has the shape of another.
_MODEL = ModelCase(depth=3, registers=2, heads=3, grid=(2, 3), dtype=torch.float32, seed=1)
_MODULE = AttentionCase(heads=3, head_dim=4, batch=2, length=9, dtype=torch.float32, seed=1)


def main(folder: str, package: str, result: str) -> None:
    """Write the audit of ``package`` in ``folder`` to the file ``result``."""
    torch.set_num_threads(1)
    Path(result).write_text(_audit(load(package, folder)).as_json(), encoding="utf-8")


def _audit(code: Code) -> Audit:
    """Audit the models of ``code``; where there are none, its attention modules."""
    models, modules = code.classes(Role.TRANSFORMER), code.classes(Role.ATTENTION)
    trouble = [] if models or not code.passed_over else [code.lacks("vision transformer")]
    if not (models or modules):
        trouble = [code.lacks("attention")]
    found: list[Finding] = []
    for cls in models or modules:
        try:
            findings = _of_class(code, cls, "model" if models else "attention")
        except Exception as error:  # foreign code can raise anything
            reason = f"{type(error).__name__}: {in_one_line(error)}"
            trouble.append(f"{cls.__qualname__} cannot be built small ({reason})")
            continue
        found += _named(findings, cls) if len(models or modules) > 1 else findings
    return Audit(tuple(found), "; ".join(trouble))


def _of_class(code: Code, cls: type, name: str) -> list[Finding]:
    if name == "model":
        return audit(_built(code, cls), _MODEL.images)
    return audit(*_MODULE.build(cls), name=name)


def _built(code: Code, cls: type) -> Any:
    """Build a model of the most derived classes, or of the last pair of classes that it takes.

    A copy may hold the blocks of other models too.
    """
    parts = (Role.BLOCK, Role.ATTENTION)
    for pair in product(*(code.classes(part)[::-1] for part in parts)):
        chosen = {part: [own] for part, own in zip(parts, pair, strict=True)}
        for one in (code, replace(code, parts={**code.parts, **chosen})):
            with suppress(Exception):  # foreign code can raise anything
                return _MODEL.build(one, cls)
    return _MODEL.build(code, cls)


def _named(findings: list[Finding], cls: type) -> Iterator[Finding]:
    for finding in findings:
        yield replace(finding, where=f"{cls.__qualname__}: {finding.where}")


if __name__ == "__main__":
    main(*sys.argv[1:])
