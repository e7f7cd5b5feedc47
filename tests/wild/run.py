"""Compare one target with its truth and print one line of JSON.

python -m tests.wild.run NAME [--source PATH] [--mirrors FOLDER] [--cache FOLDER] [--xformers]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import warnings
from pathlib import Path

import torch

from tests.wild import sources, stand_ins
from tests.wild.compare import Report, report_on
from tests.wild.target import PyPI, Target
from tests.wild.targets import named


def main(arguments: list[str] | None = None) -> int:
    options = _parsed(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if not options.xformers:  # it has no kernel for CPUs, where projects call it all the same
        sys.modules["xformers"] = None  # type: ignore[assignment]  # Python's own sign
    with contextlib.redirect_stdout(sys.stderr):  # projects print while they are imported
        report = _report(named(options.name), options)
    print(json.dumps(report.as_dict()))
    return 0


def _report(target: Target, options: argparse.Namespace) -> Report:
    try:
        _make_importable(target, _folders(target, options))
    except sources.SourceUnavailableError as error:
        source = target.source
        report = Report(target.name, source.project, source.revision, target.differs)
        report.verdict = f"cannot be built here: {error}"
        return report
    return report_on(target)


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.wild.run", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--source", type=Path, help="the folder with the project's code")
    parser.add_argument("--mirrors", type=Path, help="a folder with clones named owner+name")
    parser.add_argument("--cache", type=Path, default=sources.default_cache())
    parser.add_argument("--xformers", action="store_true", help="let the project see xFormers")
    return parser.parse_args(arguments)


def _folders(target: Target, options: argparse.Namespace) -> list[Path]:
    if options.source is None:
        return sources.folders_of(target, options.cache, options.mirrors)
    needed = [sources.wheel_folder(PyPI(need), options.cache) for need in target.needs]
    return [options.source / target.path, *needed]


def _make_importable(target: Target, folders: list[Path]) -> None:
    sys.path[:0] = [str(folder) for folder in folders]
    for name in target.stubs:
        stand_ins.stub(name)
    for name in target.bare:
        stand_ins.enter_bare(name, folders[0])


if __name__ == "__main__":
    sys.exit(main())
