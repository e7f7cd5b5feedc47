"""Reports on verified revisions: a table, JSON, JUnit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from xml.etree import ElementTree

from dinov2_attn.errors import shown
from dinov2_attn.history import eras
from dinov2_attn.history.projects import DINOV2, Project, project_named
from dinov2_attn.proof.verify.proof import ABSENT, COLUMNS, FAILED, PROVEN, Proof
from dinov2_attn.proof.verify.sources import Revision


@dataclass(frozen=True)
class Line:
    """A revision, its code and its proof; ``same_as`` names the tested one with equal code."""

    revision: Revision
    digests: dict[str, str]
    proof: Proof
    same_as: str = ""

    @property
    def era(self) -> str:
        """The era of its code."""
        return era_of(self.digests, project_named(self.revision.package))

    @property
    def cells(self) -> dict[str, str]:
        """The columns of the table."""
        return {
            "revision": self.revision.name,
            "date": self.revision.date or ABSENT,
            "era": self.era,
            **{column: self.proof.cell(column) for column in COLUMNS},
            "verdict": self.proof.verdict + (f" (as {self.same_as})" if self.same_as else ""),
        }


def era_of(digests: dict[str, str], project: Project = DINOV2) -> str:
    """Return the era of this code: ``new`` if there is none, ``–`` without code."""
    if not digests:
        return ABSENT
    code = frozenset(digests.items())
    found = [era for era in eras.table(project) if era.code == code]
    # Without the dates.
    return re.sub(r" \([^)]*\)", "", eras.span(found, project)) if found else "new"


def table(lines: Sequence[Line]) -> str:
    """Return a Markdown table, the audits, the reasons of failures and gaps, and the total."""
    rows = [list(line.cells.values()) for line in lines]
    head = ["revision", "date", "era", *COLUMNS, "verdict"]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    cells = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in (head, rule, *rows)]
    parts = [*(f"| {' | '.join(row)} |" for row in cells), "", *_own_attention(lines)]
    return "\n".join([*parts, "", *_remarks(lines)])


def as_json(lines: Iterable[Line]) -> str:
    """Return the table and all failures as JSON."""
    return json.dumps(
        [
            {
                **line.cells,
                "package": line.revision.package,
                "verdict": line.proof.verdict,
                "same_as": line.same_as or None,
                "reason": line.proof.reason or None,
                "left_out": line.proof.left_out,
                "own_attention": [asdict(finding) for finding in line.proof.audit.findings],
                "own_attention_not_asked": line.proof.audit.trouble or None,
                "tests": len(line.proof.cases),
                "seconds": line.proof.seconds,
            }
            for line in lines
        ],
        indent=1,
    )


def as_junit(lines: Iterable[Line]) -> str:
    """Return a JUnit report: one suite per revision, one case per column.

    XML has no letters that steer a terminal, so they are escaped as elsewhere.
    """
    root = ElementTree.Element("testsuites", name="dinov2-attn verify")
    for line in lines:
        suite = ElementTree.SubElement(root, "testsuite", name=shown(line.revision.name))
        for column in [*COLUMNS, "verdict"]:
            case = ElementTree.SubElement(
                suite, "testcase", classname=shown(line.revision.name), name=column
            )
            cell = line.proof.verdict if column == "verdict" else line.proof.cell(column)
            if cell == ABSENT:
                ElementTree.SubElement(
                    case, "skipped", message=shown(line.proof.left_out.get(column, ""))
                )
            elif cell == FAILED or (column == "verdict" and cell != PROVEN):
                ElementTree.SubElement(case, "failure", message=shown(line.proof.reason))
        cases = list(suite)
        suite.set("tests", str(len(cases)))
        suite.set("failures", str(sum(c.find("failure") is not None for c in cases)))
        suite.set("skipped", str(sum(c.find("skipped") is not None for c in cases)))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def _own_attention(lines: Sequence[Line]) -> list[str]:
    """Return what each copy itself returns as attention; equal answers are said once."""
    answers: dict[str, list[str]] = {}
    for line in lines:
        if not line.same_as:
            for answer in line.proof.audit.lines:
                answers.setdefault(answer, []).append(line.revision.name)
    said = [f"- {', '.join(names)}: {answer}" for answer, names in answers.items()]
    return ["What the copy itself returns as attention:", "", *said]


def _remarks(lines: Sequence[Line]) -> list[str]:
    own = [line for line in lines if not line.same_as]
    remarks = [f"{line.revision.name}: {line.proof.reason}" for line in own if line.proof.reason]
    absent: dict[str, list[str]] = {}
    for line in own:
        for column, reason in line.proof.left_out.items():
            absent.setdefault(f"{column} {ABSENT}: {reason}", []).append(line.revision.name)
    remarks += [f"{what} ({', '.join(names)})" for what, names in absent.items()]
    proven = sum(line.proof.verdict == PROVEN for line in lines)
    copies = len(lines) - len(own)
    same = f" ({len(own)} run; {copies} with the same code as another)" if copies else ""
    return [*remarks, f"{proven} of {len(lines)} proven{same}"]
