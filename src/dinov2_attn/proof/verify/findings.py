"""What a copy itself returns as attention: findings, and the process that makes them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from dinov2_attn.proof.verify.process import environment

_PROGRAM = "dinov2_attn.proof.verify.audit_program"
_SECONDS = 120


@dataclass(frozen=True)
class Finding:
    """One way in which a copy offers attention, and what comes back.

    Attributes:
        where: The call, such as ``model.get_last_self_attention(images)``.
        verdict: What comes back, in words.
        kernel: Under which kernel: ``PyTorch`` or ``xFormers``; ``""`` if it is the same.
        is_weights: Whether these are the kernel's weights of the expected layer.
        note: Where a wrong recipe comes from.

    """

    where: str
    verdict: str
    kernel: str = ""
    is_weights: bool = False
    note: str = ""

    def __str__(self) -> str:
        under = f", with {self.kernel}" if self.kernel else ""
        note = f" ({self.note})" if self.note else ""
        return f"{self.where}{under}: {self.verdict}{note}"


@dataclass(frozen=True)
class Audit:
    """The findings on one copy of the code, and why a part of it could not be asked."""

    findings: tuple[Finding, ...] = ()
    trouble: str = ""

    @property
    def lines(self) -> list[str]:
        """One line for each finding and for what was not asked; one if nothing is offered.

        The first finding with a note gives it.
        """
        noted = {finding.note: finding for finding in reversed(self.findings)}
        found = [
            str(one if noted[one.note] is one else replace(one, note="")) for one in self.findings
        ]
        unasked = [f"not asked: {self.trouble}"] if self.trouble else []
        return [*found, *unasked] or ["offers no attention of its own"]

    def as_json(self) -> str:
        """Return it as JSON, which ``read`` reads."""
        return json.dumps(
            {"findings": [vars(finding) for finding in self.findings], "trouble": self.trouble}
        )

    @classmethod
    def read(cls, text: str) -> Audit:
        """Return what ``as_json`` wrote."""
        made = json.loads(text)
        return cls(tuple(Finding(**finding) for finding in made["findings"]), made["trouble"])


def audit_copy(folder: Path, package: str) -> Audit:
    """Build the models of a copy small, and audit them in a fresh process.

    Args:
        folder: The folder or wheel that holds the package.
        package: The dotted name of the package.

    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "audit.json"
        command = [sys.executable, "-W", "ignore", "-m", _PROGRAM, str(folder), package]
        try:
            done = subprocess.run(
                [*command, str(result)], cwd=scratch, env=environment(), capture_output=True,
                text=True, check=False, timeout=_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Audit(trouble=f"the audit did not finish within {_SECONDS} s")
        if result.is_file():
            return Audit.read(result.read_text(encoding="utf-8"))
        output = (done.stderr or done.stdout).strip().splitlines()
        return Audit(trouble=output[-1] if output else "no output from the audit")
