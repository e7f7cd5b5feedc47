"""Run the conformance suite on one revision, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from dinov2_attn.errors import UnavailableError
from dinov2_attn.proof.verify.findings import Audit
from dinov2_attn.proof.verify.process import environment

SUITE = "dinov2_attn.proof.conformance"
_SECONDS = 600

PASSED, FAILED, ABSENT = "yes", "NO", "–"


@dataclass(frozen=True)
class Case:
    """One test of the suite: its file, name, outcome and message."""

    file: str
    name: str
    outcome: str
    message: str = ""


# The columns of the table, with the tests of each.
COLUMNS: dict[str, Callable[[Case], bool]] = {
    "install": lambda case: case.file == "test_install",
    "bit-identity": lambda case: case.file == "test_bit_identity",
    "faithful": lambda case: case.file == "test_faithful",
    "rows": lambda case: case.file in ("test_rows", "test_selection"),
    "nested": lambda case: case.file == "test_nested" and "without_xformers" not in case.name,
    "chunked": lambda case: "chunked" in case.name,
    "registers": lambda case: (
        case.file == "test_layout" and "-reg" in case.name and "-reg0" not in case.name
    ),
}


@dataclass(frozen=True)
class Proof:
    """The results of the suite on one copy of the code, and the audit of its own attention."""

    cases: tuple[Case, ...] = ()
    trouble: str = ""
    audit: Audit = field(default_factory=Audit)
    seconds: float = field(default=0.0, compare=False)

    def cell(self, column: str) -> str:
        """Return ``yes``, ``NO``, or ``–`` if the tests do not apply to this copy."""
        return _sum_up(case for case in self.cases if COLUMNS[column](case))

    @property
    def verdict(self) -> str:
        """``proven``, ``refused`` (by ``install``, nothing grafted), or ``FAILED``."""
        if self.trouble:
            return FAILED_VERDICT
        if not any(case.outcome == FAILED for case in self.cases):
            return PROVEN
        return REFUSED if self.cell("install") == FAILED else FAILED_VERDICT

    @property
    def reason(self) -> str:
        """The first failure, in one line."""
        failed = [case for case in self.cases if case.outcome == FAILED]
        first = self.trouble or (f"{failed[0].name}: {failed[0].message}" if failed else "")
        return " ".join(first.split())

    @property
    def left_out(self) -> dict[str, str]:
        """The reason of each empty column; nothing after a refusal, which empties all of them."""
        if self.verdict == REFUSED:
            return {}
        reasons = {
            column: next((c.message for c in self.cases if belongs(c) and c.message), "")
            for column, belongs in COLUMNS.items()
            if self.cell(column) == ABSENT
        }
        return {column: reason for column, reason in reasons.items() if reason}


PROVEN, REFUSED, FAILED_VERDICT = "proven", "refused", "FAILED"


def prove(folder: Path, package: str) -> Proof:
    """Run the conformance suite on ``package`` in ``folder``, in a fresh process.

    Args:
        folder: The folder or wheel that holds the package.
        package: The dotted name of the package.

    Raises:
        UnavailableError: If pytest is not installed.

    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        # Settings of its own, so that no configuration of a project is used.
        settings = Path(scratch) / "pytest.ini"
        settings.write_text("[pytest]\n", encoding="utf-8")
        options = [f"--dinov2={folder}", f"--package={package}", f"--junitxml={report}"]
        options += [f"--rootdir={scratch}", f"-c={settings}"]
        quiet = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", f"{SUITE}.plugin"]
        command = [sys.executable, "-m", "pytest", *quiet, "--pyargs", SUITE, *options]
        try:
            done = subprocess.run(
                command, cwd=scratch, env=environment(), capture_output=True, text=True,
                check=False, timeout=_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Proof(trouble=f"the suite did not finish within {_SECONDS} s")
        if "No module named pytest" in done.stderr:
            raise UnavailableError(
                "pytest, which runs the suite", "none", "pip install 'dinov2-attn[test]'"
            )
        if not report.is_file():
            output = (done.stderr or done.stdout).strip().splitlines()
            return Proof(trouble=output[-1] if output else "no output from the suite")
        return read(report.read_text(encoding="utf-8"))


def read(report: str) -> Proof:
    """Read pytest's JUnit report."""
    suite = next(ElementTree.fromstring(report).iter("testsuite"))
    cases = tuple(map(_case, suite.iter("testcase")))
    trouble = "" if cases else "the suite collected nothing"
    return Proof(cases, trouble, seconds=float(suite.get("time", 0)))


def _case(element: ElementTree.Element) -> Case:
    file = element.get("classname", "").rpartition(".")[2]
    for tag, outcome in (("failure", FAILED), ("error", FAILED), ("skipped", ABSENT)):
        found = element.find(tag)
        if found is not None:
            return Case(file, element.get("name", ""), outcome, found.get("message", ""))
    return Case(file, element.get("name", ""), PASSED)


def _sum_up(cases: Iterable[Case]) -> str:
    outcomes = {case.outcome for case in cases}
    return next((o for o in (FAILED, PASSED) if o in outcomes), ABSENT)
