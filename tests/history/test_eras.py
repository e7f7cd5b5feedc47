"""Recognising upstream by its code: the table of eras, and what is said of drift."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import textwrap
import zipfile
from pathlib import Path

import pytest

import dinov2_attn
from dinov2_attn._download import fetch_wheel
from dinov2_attn.apps.weights.source import DINOV2_WHEEL
from dinov2_attn.errors import UnavailableError
from dinov2_attn.history import eras
from dinov2_attn.history.projects import DINOV3, PROJECTS
from dinov2_attn.proof.verify import rebuild_eras
from tests.support import upstreams
from tests.support.subprocesses import python

ATTENTION, BLOCK = "dinov2/layers/attention.py", "dinov2/layers/block.py"
HISTORY = os.environ.get("DINOV2_ATTN_HISTORY", rebuild_eras.UPSTREAM)
DINOV3_HISTORY = os.environ.get("DINOV2_ATTN_DINOV3_HISTORY")


@pytest.fixture(autouse=True)
def _clean():
    dinov2_attn.uninstall()
    yield
    dinov2_attn.uninstall()


def test_every_commit_is_in_one_era():
    commits = [commit for era in eras.table() for commit in era.commits]
    assert len(commits) == len({commit.name for commit in commits}) >= 50
    assert (str(commits[0]), str(commits[49])) == ("fc49f49 2023-04-17", "7764ea0 2026-06-03")
    assert [commit.date for commit in commits] == sorted(commit.date for commit in commits)
    assert len({era.code for era in eras.table()}) == len(eras.table())
    assert all(era in eras.agreeing(era.code) for era in eras.table())


@pytest.mark.parametrize("project", PROJECTS, ids=str)
def test_the_table_has_every_function_relied_on_and_no_other(project):
    relied_on = {
        f for section in project.relied_on.values() for names in section.values() for f in names
    }
    assert relied_on == {name for era in eras.table(project) for name in era.digests}


@pytest.mark.parametrize("project", PROJECTS, ids=str)
def test_a_table_that_is_written_and_read_is_the_same(project):
    committed = Path(eras.__file__).with_name(project.table).read_text(encoding="utf-8")
    assert eras.dumps(eras.table(project)) == committed


def test_the_table_keeps_what_it_is_given():
    gone = eras.propose(eras.table(), {"Attention.forward": "0"}, "0" * 40, "2030-01-01")
    assert eras.loads(eras.dumps(gone)) == gone


def test_a_commit_is_proposed_for_the_newest_era_or_a_new_one():
    newest = eras.table()[-1]
    same = eras.propose(eras.table(), newest.digests, "0123456789", "2030-01-01")
    assert same[:-1] == eras.table()[:-1]
    assert same[-1] == eras.Era(
        (*newest.commits, eras.Commit("0123456", "2030-01-01")), newest.digests
    )
    digests = {**newest.digests, "Attention.forward": "0"}
    other = eras.propose(eras.table(), digests, "0123456789", "2030-01-01")
    assert other[:-1] == eras.table()
    assert other[-1].digests == digests


def test_a_range_is_named_by_its_ends():
    table = eras.table()
    assert eras.span(table[3:4]) == "44abdbe (2023-09-30)"
    assert eras.span(table[:2]) == "fc49f49 … be7e572 (2023-04-17 … 2023-08-29)"
    assert eras.span([table[0], table[3]]).endswith("2023-04-26) or 44abdbe (2023-09-30)")


def read_wheel(path):
    with zipfile.ZipFile(fetch_wheel(DINOV2_WHEEL)) as wheel:
        return wheel.read(path).decode()


def test_the_first_commit_is_the_first_era():
    assert eras.digests_at(read_wheel) == eras.table()[0].digests


def test_the_table_is_what_upstreams_history_gives():
    try:
        rebuilt = rebuild_eras.rebuild(HISTORY)
    except UnavailableError as error:
        pytest.skip(f"{error}; the first era was held against PyPI's copy instead")
    assert rebuilt == eras.table()


def test_the_table_of_dinov3_is_what_its_history_gives():
    """All of it: 70 commits, of which one changed only how weights are initialised."""
    if not DINOV3_HISTORY:
        pytest.skip("DINOV2_ATTN_DINOV3_HISTORY names no clone of DINOv3")
    assert rebuild_eras.rebuild(DINOV3_HISTORY) == eras.table(DINOV3)


def test_every_commit_of_dinov3_is_in_one_era():
    commits = [commit for era in eras.table(DINOV3) for commit in era.commits]
    assert len(commits) == len({commit.name for commit in commits}) >= 70
    assert (commits[0].name, commits[69].name) == ("11c5863", "6876159")


def test_a_history_is_read_without_running_it(tmp_path):
    """A small one, so that what makes the table is run where the real one does not answer."""
    if shutil.which("git") is None:
        pytest.skip("no git here; the committed table is tested all the same")

    def commit(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", path]):
            subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)

    attention = read_wheel(ATTENTION)
    commit("README.md", "nothing yet")
    commit(ATTENTION, "raise SystemExit\n" + attention)
    commit(ATTENTION, "# A comment.\nraise SystemExit\n" + attention)
    commit(BLOCK, read_wheel(BLOCK))
    found = rebuild_eras.rebuild(tmp_path)
    assert [len(era.commits) for era in found] == [1, 2, 1]
    assert [len(era.digests) for era in found] == [0, 3, 8]
    assert found[2].code <= eras.table()[0].code
    assert all(
        re.fullmatch(r"[0-9a-f]{7} \d{4}-\d\d-\d\d", str(c)) for e in found for c in e.commits
    )
    with pytest.raises(UnavailableError, match=r"(?s)Expected an answer to git clone.*Found"):
        rebuild_eras.rebuild(tmp_path / "absent")


# One process holds one dinov2: each copy that was changed runs in one of its own.

SCRIPT = """
    import sys, warnings
    sys.path.insert(0, sys.argv[1])
    sys.modules["xformers"] = None
    import dinov2_attn
    from dinov2_attn.history import eras

    if sys.argv[4]:  # the table as it was when this commit was the newest
        eras.table = lambda project=None, oldest=eras.table()[:1]: oldest

    def load():
        import dinov2.models.vision_transformer as module
        return module

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter(sys.argv[3], dinov2_attn.errors.UpstreamDriftWarning)
        try:
            for step in sys.argv[2].split():
                if step == "import":
                    load()
                elif step == "layers":
                    import dinov2.layers
                elif step == "install":
                    dinov2_attn.install()
                else:
                    dinov2_attn.install(model)
                if "dinov2.models.vision_transformer" in sys.modules:
                    import torch
                    model = load().DinoVisionTransformer(
                        img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1, block_chunks=0)
            print(*model.get_last_self_attention(torch.rand(1, 3, 4, 4)).shape)
        except (NameError, dinov2_attn.Dinov2AttnError, UserWarning) as error:
            print(type(error).__name__, len(dinov2_attn.status().grafted))
    print(*dinov2_attn.status().recognised.values())
    print(*[warning.message for warning in caught], sep="\\n", end="")
"""
WORKS = "1 1 5 5"
FIRST = (
    "attention and blocks as in fc49f49 … ca58ffc (2023-04-17 … 2023-04-26), verified; "
    "models as in fc49f49 … e7df9fc (2023-04-17 … 2023-09-30), verified"
)


@pytest.fixture
def copy(tmp_path):
    """Upstream's first commit in a folder, to be changed and then run."""
    with zipfile.ZipFile(fetch_wheel(DINOV2_WHEEL)) as wheel:
        wheel.extractall(tmp_path)
    return tmp_path


def change(copy, path, pattern, replacement):
    text = (copy / path).read_text()
    changed = re.sub(pattern, replacement, text)
    assert changed != text
    (copy / path).write_text(changed)


def run(copy, steps="install import", action="always", newest=True):
    """Return what came of it, what was recognised, and the warnings of drift.

    With ``newest``, the copy is judged as if its commit were the newest that is known.
    """
    environment = {"PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": ""}
    arguments = [copy, steps, action, "newest" if newest else ""]
    result = python("-c", textwrap.dedent(SCRIPT), *arguments, cwd=copy, **environment)
    assert result.returncode == 0, result.stderr
    outcome, recognised, *warned = result.stdout.split("\n")
    return outcome, recognised, list(filter(None, warned))


def rename_a_local(copy):
    change(copy, ATTENTION, r"\battn\b", "weights")


@pytest.mark.parametrize("steps", ["install import", "import install model install"])
def test_drift_that_holds_works_and_is_warned_of_once(copy, steps):
    rename_a_local(copy)
    outcome, recognised, warned = run(copy, steps)
    assert outcome == WORKS
    assert len(warned) == 1
    assert "known here. It is as in fc49f49 … ca58ffc (2023-04-17 … 2023-04-26)" in warned[0]
    assert " but for Attention.forward. " in warned[0]
    assert f"dinov2-attn verify {copy} --update" in warned[0]
    assert "attention as in fc49f49 … ca58ffc" in recognised
    assert " but for Attention.forward, verified by contract and behaviour; blocks" in recognised


def test_a_live_model_of_upstreams_is_warned_of_by_its_own_classes(copy):
    rename_a_local(copy)
    change(copy, ATTENTION, "attn_bias is not None", "not attn_bias is None")  # it has no MemEff
    outcome, _, warned = run(copy, "import model model")
    assert outcome == WORKS
    assert len(warned) == 1
    assert " but for Attention.forward. " in warned[0]


def test_one_warning_names_all_that_changed(copy):
    rename_a_local(copy)
    change(copy, BLOCK, r"\btensors_bs1\b", "flattened")
    change(copy, "dinov2/models/vision_transformer.py", "for b in self:", "for b in list(self):")
    _, recognised, warned = run(copy)
    assert len(warned) == 1
    names = ["Attention.forward", "get_attn_bias_and_cat", "BlockChunk.forward"]
    assert f" but for {', '.join(names)}. " in warned[0]
    assert all(f" but for {name}, verified by contract" in recognised for name in names)


def test_code_of_two_revisions_at_once_is_that_of_none():
    first, newest = eras.table()[0].digests, eras.table()[-1].digests
    mixed = {**newest, "MemEffAttention.forward": first["MemEffAttention.forward"]}
    code = frozenset(mixed.items())
    assert eras.agreeing(code) == []
    assert code - eras.shared_with_nearest(code) == {
        ("MemEffAttention.forward", first["MemEffAttention.forward"])
    }


def test_comments_docstrings_and_format_are_no_drift(copy):
    signature = r"def forward\(self, x: Tensor\) -> Tensor:"
    change(copy, ATTENTION, signature, '\\g<0>\n        """New."""\n        # New.\n')
    change(copy, BLOCK, r"return (self\.forward_nested\(\w+\))", r"return (\n\1\n)")
    assert run(copy, newest=False) == (WORKS, FIRST, [])


def test_a_method_that_is_gone_is_drift(copy):
    """Its class inherits another, whose own digest is known."""
    nothing = "class MemEffAttention(Attention):\n    pass\n"
    change(copy, ATTENTION, r"class MemEffAttention(.|\n)*", nothing)
    outcome, _, warned = run(copy)
    assert outcome == WORKS
    assert " but for MemEffAttention.forward (gone). " in "".join(warned)


def test_a_fork_of_an_old_revision_is_recognised_and_not_warned_of(copy):
    """NeCo, SimDINO and others call their package dinov2 too."""
    rename_a_local(copy)
    outcome, recognised, warned = run(copy, newest=False)
    assert (outcome, warned) == (WORKS, [])
    assert " but for Attention.forward, verified by contract" in recognised


@pytest.mark.parametrize("steps", ["install import", "import model"])
def test_behaviour_that_breaks_is_refused_and_no_drift(copy, steps):
    change(copy, ATTENTION, r"softmax\(dim=-1\)", "softmax(dim=-2)")
    outcome, recognised, warned = run(copy, steps)
    assert (outcome, warned) == ("IncompatibleUpstreamError 0", [])
    assert " as in " not in recognised


@pytest.mark.parametrize("steps", ["install import", "import model"])
def test_where_warnings_are_errors_drift_leaves_nothing_behind(copy, steps):
    rename_a_local(copy)
    assert run(copy, steps, "error")[0] == "UpstreamDriftWarning 0"


def test_layers_without_a_model_are_recognised_and_not_yet_judged(copy):
    rename_a_local(copy)
    outcome, recognised, warned = run(copy, "install layers")
    assert outcome.startswith("NameError")
    assert (recognised.count(" but for Attention.forward"), warned) == (1, [])


def test_upstream_without_its_source_is_known_by_what_it_does(copy):
    python("-m", "compileall", "-q", "-b", "dinov2/layers", "dinov2/models", cwd=copy)
    for file in [*copy.glob("dinov2/layers/*.py"), *copy.glob("dinov2/models/*.py")]:
        file.unlink()
    outcome, recognised, warned = run(copy)
    assert (outcome, warned) == (WORKS, [])
    assert recognised.count("verified by contract and behaviour, source not available") == 3


# Forks are known by what they do; where their code is upstream's, that is said as well. The tests
# treat warnings as errors, so that one about them would fail here.


def recognised_as(upstream):
    if upstream.model:
        upstream.module(upstream.model)
    upstream.module(upstream.block)
    with dinov2_attn.install(upstream.package):
        (said,) = dinov2_attn.status().recognised.values()
    return said


def test_a_fork_with_upstreams_code_is_described_as_such():
    assert recognised_as(upstreams.DEPTH_ANYTHING) == (
        "attention and blocks as in c0ffb6e … be7e572 (2023-04-26 … 2023-08-29), verified; "
        "models as in 9c7e324 … 2302b6b (2023-10-27 … 2023-12-01), verified"
    )


def test_the_changed_functions_of_a_fork_are_named():
    said = recognised_as(upstreams.ROMA).split("; ")
    assert said[0].endswith(" but for Attention.forward, verified by contract and behaviour")
    assert said[1].startswith("blocks as in fc49f49 … be7e572 (")
    assert said[2].endswith("), verified")


def test_an_unknown_fork_is_described_as_unknown():
    known_by_behaviour = "blocks as in no known revision, verified by contract and behaviour"
    assert recognised_as(upstreams.ANOMALIB).endswith(known_by_behaviour)


def test_a_class_of_the_users_own_is_named():
    class Model(upstreams.DEPTH_ANYTHING.cls("DinoVisionTransformer")):
        def forward(self, x):
            return super().forward(x)

    model = Model(img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1)
    with dinov2_attn.install(model):
        (said,) = dinov2_attn.status().recognised.values()
    assert said.startswith("attention and blocks as in fc49f49 … be7e572 (")
    assert said.endswith("Model verified by contract and behaviour")
