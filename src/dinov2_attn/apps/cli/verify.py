"""``dinov2-attn verify``: prove a checkout, a commit or the whole history."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from dinov2_attn._files import write_file
from dinov2_attn.apps.cli import early
from dinov2_attn.apps.cli.argtypes import positive
from dinov2_attn.apps.cli.report import say
from dinov2_attn.history import eras
from dinov2_attn.history.projects import PROJECTS, Project, project_named
from dinov2_attn.proof.verify.findings import audit_copy
from dinov2_attn.proof.verify.proof import PROVEN, Proof, prove
from dinov2_attn.proof.verify.rebuild_eras import UPSTREAM
from dinov2_attn.proof.verify.report import Line, as_json, as_junit, table
from dinov2_attn.proof.verify.sources import Revision, find

log = logging.getLogger(__name__)

LICENCE = (
    "the code of %s is under %s (LICENSE.md in %s): it is read and run here, and nothing of it is "
    "kept"
)


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "verify",
        help="Prove the attention of any checkout, commit or distribution.",
        description="Run the conformance suite on each SOURCE, with one process for each "
        "revision, and say what the copy itself returns as attention. The exit status is 0 if "
        "all are proven, 1 if not, and 2 for an error before that.",
        epilog="Example: dinov2-attn verify path/to/dinov2@main --json report.json",
    )
    parser.add_argument(
        "sources",
        nargs="*",
        default=[UPSTREAM],
        metavar="SOURCE",
        help="A folder or a wheel, a git repository (path or URL) with @REV or with @all for its "
        f"whole history, or pypi:NAME==VERSION. Default: {UPSTREAM}.",
    )
    parser.add_argument(
        "--package", metavar="NAME", help="The name of the package. Default: it is found."
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=os.cpu_count() or 1,
        metavar="N",
        help="How many processes run at once. Default: the number of cores.",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="Write the results as JSON, or - for standard output."
    )
    parser.add_argument("--junit", metavar="FILE", help="Write a JUnit report, for CI.")
    parser.add_argument(
        "--update",
        action="store_true",
        help="Print the era of new code that is proven, as data for a report.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify, report, and return the exit status."""
    for file in (args.json, args.junit):
        if file not in (None, "-"):
            early.check_file(Path(file))
    with tempfile.TemporaryDirectory(prefix="dinov2-attn-") as scratch:
        revisions = _find(args, Path(scratch))
        proofs = _prove(revisions, args.jobs)
        lines = _lines(revisions, proofs)
    if args.json != "-":
        say(args, table(lines))
    _write(args, args.json, as_json, lines)
    _write(args, args.junit, as_junit, lines)
    if args.update:
        _propose(lines)
    return 0 if all(line.proof.verdict == PROVEN for line in lines) else 1


def _find(args: argparse.Namespace, scratch: Path) -> list[Revision]:
    revisions = []
    for i, source in enumerate(args.sources):
        own = scratch / str(i)
        own.mkdir()
        revisions += find(source, args.package, own)
    for project in dict.fromkeys(project_named(r.package) for r in revisions):
        if project.licence:
            log.warning(LICENCE, project, project.licence, project.address)
    return revisions


def _prove(revisions: list[Revision], jobs: int) -> dict[str, Proof]:
    """Prove each distinct content once, in parallel."""
    from tqdm import tqdm

    first = {revision.content: revision for revision in reversed(revisions)}
    proofs: dict[str, Proof] = {}
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(_prove_one, r): content for content, r in first.items()}
        try:
            for done in tqdm(as_completed(running), total=len(running), unit="copy", disable=None):
                proofs[running[done]] = done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return proofs


def _prove_one(revision: Revision) -> Proof:
    folder = revision.unpack()
    proof = prove(folder, revision.package)
    return replace(proof, audit=audit_copy(folder, revision.package))


def _lines(revisions: list[Revision], proofs: dict[str, Proof]) -> list[Line]:
    first: dict[str, Line] = {}
    lines = []
    for revision in revisions:
        ran = first.get(revision.content)
        if ran is None:
            digests, proof = _digests_of(revision), proofs[revision.content]
            line = first[revision.content] = Line(revision, digests, proof)
        else:
            same_as = "" if ran.revision.name == revision.name else ran.revision.name
            line = replace(ran, revision=revision, same_as=same_as)
        lines.append(line)
    return lines


def _digests_of(revision: Revision) -> dict[str, str]:
    return eras.digests_at(revision.read, project_named(revision.package))


def _write(
    args: argparse.Namespace,
    file: str | None,
    form: Callable[[Iterable[Line]], str],
    lines: list[Line],
) -> None:
    if file == "-":
        print(form(lines))
    elif file is not None:
        text = form(lines) + "\n"
        write_file(file, text.encode("utf-8", "backslashreplace"))
        say(args, f"wrote {file}")


def _propose(lines: list[Line]) -> None:
    new = [line for line in lines if line.era == "new" and line.proof.verdict == PROVEN]
    if not new:
        log.info("nothing to propose: every revision is of a known era, or is not proven")
    for project in PROJECTS:
        _propose_for(project, [r for r in new if project_named(r.revision.package) is project])


def _propose_for(project: Project, new: list[Line]) -> None:
    if not new:
        return
    proposed = eras.table(project)
    for line in new:
        name, date = line.revision.name, line.revision.date or "unknown"
        proposed = eras.propose(proposed, line.digests, name, date)
    entries = json.loads(eras.dumps(proposed))[len(eras.table(project)) :]
    print(json.dumps(entries, indent=1), file=sys.stdout)
    log.info(f"append this to {project.table}, or open an issue with it")
