"""``dinov2-attn verify``: revisions are found, proved once each, and reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from xml.etree import ElementTree

import pytest

from dinov2_attn.apps.cli import main
from dinov2_attn.errors import UnavailableError
from dinov2_attn.history.eras import table as eras
from dinov2_attn.proof.verify import proof, report, sources
from tests.support import subprocesses, upstreams
from tests.support.upstreams import fetch_wheel

ATTENTION = "dinov2/layers/attention.py"


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder, change=None, file=ATTENTION):
    if change is not None:
        text = (folder / file).read_text()
        assert change[0] in text
        (folder / file).write_text(text.replace(*change))
    git(folder, "add", "-A")
    git(folder, "commit", "--allow-empty", "-qm", "a change")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """The genuine first commit, a commit beside it, new code that holds, code that does not."""
    folder = tmp_path_factory.mktemp("upstream")
    with zipfile.ZipFile(fetch_wheel(upstreams.FIRST.wheel)) as wheel:
        wheel.extractall(folder)
    git(folder, "init", "-q")
    commits = [commit(folder)]
    (folder / "README.md").write_text("no code")
    commits.append(commit(folder))
    harmless = ("attn = q @ k.transpose(-2, -1)", "attn = q.matmul(k.transpose(-2, -1))")
    commits.append(commit(folder, harmless))
    wrong = ("attn.softmax(dim=-1)", "attn.softmax(dim=-2)")
    commits.append(commit(folder, wrong))
    return folder, commits


# The whole of it


def test_a_history_is_walked_proved_and_reported(history, tmp_path, capsys):
    folder, commits = history
    as_json, junit = tmp_path / "all.json", tmp_path / "all.xml"
    arguments = [f"{folder}@all", "--json", str(as_json), "--junit", str(junit), "--update"]
    assert main.main(["verify", *arguments]) == 1
    first, beside, new, broken = json.loads(as_json.read_text())

    assert [line["revision"] for line in (first, beside, new, broken)] == [c[:7] for c in commits]
    assert first["verdict"] == beside["verdict"] == new["verdict"] == "proven"
    assert (first["same_as"], beside["same_as"]) == (None, first["revision"])
    assert first["era"] == "fc49f49 … ca58ffc"
    assert first["tests"] > 200
    columns = ("install", "bit-identity", "faithful", "rows", "chunked")
    assert [first[column] for column in columns] == ["yes"] * 5
    assert first["registers"] == "–"
    assert first["left_out"]["registers"] == "this model has no registers"

    assert new["era"] == broken["era"] == "new"
    assert broken["verdict"] == "refused"
    assert broken["install"] == "NO"
    assert "to call one kernel once" in broken["reason"]

    assert [line["own_attention"] for line in (first, beside, new, broken)] == [[]] * 4
    assert first["own_attention_not_asked"] is None

    printed = capsys.readouterr().out
    nothing = f"- {', '.join(commits[i][:7] for i in (0, 2, 3))}: offers no attention of its own"
    assert nothing in printed
    assert "3 of 4 proven (3 run; 1 with the same code as another)" in printed
    assert f"proven (as {first['revision']})" in printed
    (entry,) = json.loads(printed[printed.index("[\n") :])  # the proven one only
    assert "Attention.forward" in entry["changed"]
    assert entry["commits"] == [f"{new['revision']} {new['date']}"]

    suites = ElementTree.fromstring(junit.read_text()).findall("testsuite")
    assert [s.get("name") for s in suites] == [c[:7] for c in commits]
    *proven, refused = [int(suite.get("failures")) for suite in suites]
    assert proven == [0, 0, 0]
    assert refused >= 2
    assert suites[3].find("testcase[@name='verdict']/failure").get("message") == broken["reason"]


# What is found


def test_a_revision_is_named_as_git_names_it(history, tmp_path):
    folder, commits = history
    for at in ("HEAD~3", commits[0], commits[0][:9]):
        (found,) = sources.find(f"{folder}@{at}", None, tmp_path)
        assert found.name == commits[0][:7]
        assert found.package == "dinov2"
    assert (found.unpack() / ATTENTION).is_file()
    assert found.read("absent.py") is None


def test_a_url_and_a_bare_clone_give_the_same_walk(history, tmp_path):
    folder, commits = history
    git(tmp_path, "clone", "-q", "--bare", str(folder), "bare")
    for source in (f"file://{folder}@all", f"{tmp_path / 'bare'}@all"):
        scratch = tmp_path / source[:4].strip("/")
        scratch.mkdir()
        assert [r.name for r in sources.find(source, None, scratch)] == [c[:7] for c in commits]
    (newest,) = sources.find(str(tmp_path / "bare"), None, tmp_path)
    assert newest.name == commits[-1][:7]


def test_a_checkout_is_taken_as_it_lies(history, tmp_path):
    folder, _ = history
    (found,) = sources.find(str(folder), None, tmp_path)
    assert (found.name, found.package) == (folder.name, "dinov2")
    assert found.unpack() == folder


COPIES = [*upstreams.ALL, upstreams.DEPTH_ANYTHING_3]


@pytest.mark.parametrize("copy", COPIES, ids=str)
def test_the_package_of_a_wheel_is_found(copy, tmp_path):
    (found,) = sources.find(str(fetch_wheel(copy.wheel)), None, tmp_path)
    assert found.package == copy.package


def test_a_distribution_on_pypi_is_named_by_its_requirement(tmp_path):
    requirement = upstreams.FIRST.wheel.requirement
    (found,) = sources.find(f"pypi:{requirement}", None, tmp_path)
    assert (found.name, found.package) == (requirement, "dinov2")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pypi:dinov2", "Expected pypi:NAME==VERSION"),
        ("pypi:dinov2==99.99", "dinov2==99.99 from PyPI"),
        ("/nowhere/at/all", "an answer to git clone"),
        ("/nowhere@all", "an answer to git clone"),
        (".", "a copy of DINOv2's layers"),
    ],
)
def test_what_cannot_be_found_is_an_error_in_a_line(source, message, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert main.main(["verify", source]) == 2
    assert message in caplog.text


def test_an_unknown_revision_is_an_error(history, tmp_path):
    with pytest.raises(UnavailableError, match="rev-parse"):
        sources.find(f"{history[0]}@absent", None, tmp_path)


# Reports

JUNIT = """<testsuites><testsuite time="1.5">
<testcase classname="x.test_install" name="test_a"/>
<testcase classname="x.test_bit_identity" name="test_b"><failure message="two
lines"/></testcase>
<testcase classname="x.test_layout" name="test_c[M-depth2-chunks0-reg3-5x2]">
<skipped message="no registers"/></testcase>
<testcase classname="x.test_layout" name="test_c[M-depth2-chunks0-reg0-5x2]"/>
<testcase classname="x.test_nested" name="test_without_xformers_a"/>
</testsuite></testsuites>"""


def test_a_report_is_summed_up():
    found = proof.read(JUNIT)
    cells = {column: found.cell(column) for column in proof.COLUMNS}
    assert cells == {
        "install": "yes",
        "bit-identity": "NO",
        "faithful": "–",
        "rows": "–",
        "nested": "–",
        "chunked": "–",
        "registers": "–",
    }
    assert found.verdict == "FAILED"
    assert found.reason == "test_b: two lines"
    assert found.left_out == {"registers": "no registers"}


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes are Linux's")
def test_a_name_in_invalid_utf8_is_printed_in_ascii(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    with zipfile.ZipFile(fetch_wheel(upstreams.FIRST.wheel)) as wheel:
        wheel.extractall(folder)
    with (folder / ATTENTION).open("a", encoding="utf-8") as file:
        file.write("\nraise RuntimeError('not here – ever')\n")
    files = "--json", "all.json", "--junit", "all.xml"
    done = subprocesses.python(
        *("-m", "dinov2_attn", "verify", folder, *files), cwd=tmp_path, PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 1
    assert "caf\\udce9" in done.stdout
    assert "not here \\u2013 ever" in done.stdout
    (line,) = json.loads((tmp_path / "all.json").read_text())
    assert os.fsencode(line["revision"]) == b"caf\xe9"
    assert "not here – ever" in line["reason"]
    suite = ElementTree.parse(tmp_path / "all.xml").find("testsuite")
    assert suite.get("name") == "caf\\udce9"


def test_a_suite_without_results_proves_nothing(tmp_path):
    empty = proof.read('<testsuites><testsuite time="0"></testsuite></testsuites>')
    assert empty.verdict == "FAILED"
    assert proof.prove(tmp_path, "absent_package").verdict == "FAILED"


def test_an_era_is_named_by_its_range():
    newest = eras()[-1]
    assert report.era_of(dict(newest.digests)) == "12592a9 … 7764ea0"
    assert report.era_of({**newest.digests, "Block.forward": "0"}) == "new"
    assert report.era_of({}) == "–"
