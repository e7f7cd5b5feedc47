"""The shipped suite: green on real code, and it has teeth."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import shutil
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import dinov2_attn
from dinov2_attn._download import fetch_wheel
from tests.support import dinov3, subprocesses, upstreams
from tests.support.mutations import HARMLESS, MUTATIONS, unpack

PACKAGE = Path(dinov2_attn.__file__).parent
SUITE = PACKAGE / "proof" / "conformance"
NAME = "dinov2_attn.conformance"


def run(folder, package, *options, suite=SUITE, **environment):
    """Run the suite in a fresh process."""
    where = ["--dinov2", folder, "--package", package]
    command = ["-m", "pytest", "-p", "no:cacheprovider", suite, *where, *options]
    return subprocesses.python(*command, cwd=folder, **environment)


def counts(result):
    """Return how many tests passed, failed, …, by the last line."""
    words = re.findall(r"(\d+) (\w+)", result.stdout.strip().splitlines()[-1])
    return {word: int(number) for number, word in words}


@pytest.fixture(scope="module")
def bites(request, tmp_path_factory):
    """Runs of the suite by mutation, two at a time, each in a process of its own.

    Forked from one that has imported torch, which takes longer than the rest of a run.
    """
    asked = {item.callspec.id for item in request.session.items if hasattr(item, "callspec")}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytest"])
    with context.Pool(2, maxtasksperchild=1) as pool:
        yield {
            str(mutation): pool.apply_async(bite, (mutation, tmp_path_factory.mktemp("mutated")))
            for mutation in (*MUTATIONS, *HARMLESS)
            if str(mutation) in asked
        }


def bite(mutation, folder):
    """Run what is to catch a mutated copy, up to the first failure."""
    where = ["--dinov2", mutation.apply(folder), "--package", mutation.upstream.package]
    files = {SUITE / f"{name}.py": None for name in ("test_install", mutation.caught_by)}
    # Its conftest brings the options; the entry point would come after the package is imported.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = pytest.main(["-p", "no:cacheprovider", "-xq", *map(str, [*files, *where])])
    return code, output.getvalue()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutated_copy_fails_with_a_reason(bites, mutation):
    code, output = bites[str(mutation)].get(timeout=120)
    assert code == pytest.ExitCode.TESTS_FAILED, output
    assert f"{mutation.caught_by}.py::" in output.partition("short test summary")[2]
    assert re.search(mutation.reason, output), output


@pytest.mark.parametrize("mutation", HARMLESS, ids=str)
def test_a_harmless_change_passes(bites, mutation):
    code, output = bites[str(mutation)].get(timeout=120)
    assert code == pytest.ExitCode.OK, output


def test_only_one_test_reports_a_refusal(tmp_path):
    """The others are skipped: nobody reads two hundred times that the code is another."""
    without_softmax(tmp_path)
    result = run(tmp_path, "dinov2", "-q")
    assert counts(result)["failed"] == 1
    assert counts(result).keys() <= {"failed", "skipped"}
    assert "IncompatibleUpstreamError: expected" in result.stdout
    assert "to call one kernel once in a pass" in result.stdout
    alone = run(tmp_path, "dinov2", "-qx", suite=SUITE / "test_rows.py")
    assert alone.returncode == pytest.ExitCode.TESTS_FAILED, "nothing else told of the refusal"
    assert "to call one kernel once in a pass" in alone.stdout


def without_softmax(folder):
    unpack(upstreams.FIRST, folder)
    attention = folder / "dinov2" / "layers" / "attention.py"
    attention.write_text(attention.read_text().replace("softmax(dim=-1)", "sigmoid()"))


def test_attention_that_is_another_is_proved_at_its_kernel(tmp_path):
    """Real code with norms and a rotation before the kernel."""
    fork = upstreams.DEPTH_ANYTHING_3
    unpack(fork, tmp_path)
    result = run(tmp_path, fork.package, "-q")
    assert result.returncode == pytest.ExitCode.OK, result.stdout
    assert counts(result)["passed"] > 50


@pytest.mark.parametrize(
    "upstream", [upstreams.FIRST, upstreams.DEPTH_ANYTHING, upstreams.ANOMALIB], ids=str
)
def test_real_code_is_green_within_a_minute_of_work(upstream, tmp_path):
    unpack(upstream, tmp_path)
    start = _worked()
    result = run(tmp_path, upstream.package, "-rs")
    assert result.returncode == 0, result.stdout
    assert counts(result)["passed"] > 150
    assert _worked() - start < 60
    if upstream.model is None:
        assert f"{upstream.package} has no vision transformer" in result.stdout


@pytest.mark.parametrize("copy", dinov3.COPIES, ids=str)
def test_dinov3_is_green(copy, tmp_path):
    if copy.bare:
        where = ["--dinov2", fetch_wheel(upstreams.LIGHTLY.wheel), "--package", copy.package]
    else:
        where = ["--dinov3", dinov3.CHECKOUT]
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-q", SUITE, *where]
    result = subprocesses.python(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert counts(result)["passed"] > 250


def _worked():
    """Seconds of the processor's: those of the clock depend on what else runs here."""
    children = os.times()
    return children.children_user + children.children_system


def test_a_wheel_will_do_and_so_does_the_name_of_the_suite(tmp_path):
    """By ``--pyargs``, from anywhere, as the documentation says."""
    if NAME.replace(".", "_") not in {e.name for e in entry_points(group="pytest11")}:
        pytest.skip("dinov2-attn is on the path and not installed: pytest cannot find its options")
    wheel = fetch_wheel(upstreams.FIRST.wheel)
    command = ["-m", "pytest", "-p", "no:cacheprovider", "--pyargs", f"{NAME}.test_install"]
    result = subprocesses.python(*command, "--dinov2", wheel, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert f"proving dinov2 at {wheel}" in result.stdout
    assert "--dinov2" not in subprocesses.python("-m", "pytest", "--help", cwd=tmp_path).stdout


def test_the_entry_point_imports_nothing_large(tmp_path):
    """pytest imports it in every run of every user."""
    code = f"""
import sys, pytest
before = set(sys.modules)
import {NAME.replace(".", ".proof.")}.entry
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}}))
"""
    imported = set(subprocesses.python("-c", code, cwd=tmp_path).stdout.split())
    assert "dinov2_attn" in imported
    assert not imported & {"torch", "numpy", "matplotlib", "PIL"}


@pytest.mark.parametrize(
    ("where", "package", "expected"),
    [
        ("empty", "dinov2", r"expected .*empty to hold the package dinov2; found none there"),
        ("copy", "dinov2.thirdparty", "found that dinov2.thirdparty has no such class"),
    ],
)
def test_the_suite_names_why_nothing_can_be_proved(where, package, expected, tmp_path):
    (tmp_path / "empty").mkdir()
    unpack(upstreams.FIRST, tmp_path / "copy")
    (tmp_path / "copy" / "dinov2" / "thirdparty").mkdir(exist_ok=True)
    suite = SUITE / "test_install.py"
    command = ["-m", "pytest", "-p", "no:cacheprovider", suite, "--package", package, "-x"]
    result = subprocesses.python(*command, "--dinov2", tmp_path / where, cwd=tmp_path)
    assert result.returncode in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.USAGE_ERROR)
    assert re.search(expected, result.stdout + result.stderr), result.stdout


# The promise has two sides: upstream's code, and this package's own.
BROKEN = {
    "a random number drawn when nothing is asked": (
        "grafting/modules.py",
        "        if ACTIVE.on and (STATE.receivers or ACTIVE.edits):\n",
        "        import torch\n\n        torch.rand(1)\n"
        "        if ACTIVE.on and (STATE.receivers or ACTIVE.edits):\n",
        "test_bit_identity",
        "bit for bit",
    ),
    "the first head for the mean": (
        "math/attention.py",
        "weights.mean(dim=1)",
        "weights[:, 0]",
        "test_selection",
        'heads="mean" = the mean',
    ),
    "rows placed one off": (
        "math/selection.py",
        "return slice(position, position + 1)",
        "return slice(position - 1, position)",
        "test_selection",
        "= those rows",
    ),
}


@pytest.mark.parametrize(("file", "old", "new", "caught_by", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_fails_too(file, old, new, caught_by, reason, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "dinov2_attn")
    broken = tmp_path / "dinov2_attn" / file
    text = broken.read_text()
    assert old in text
    broken.write_text(text.replace(old, new))
    unpack(upstreams.FIRST, tmp_path)
    suite = tmp_path / "dinov2_attn" / "proof" / "conformance" / f"{caught_by}.py"
    result = run(tmp_path, "dinov2", "-x", "-q", suite=suite, PYTHONPATH=tmp_path)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    assert re.search(reason, result.stdout), result.stdout
