"""Every advice that an error gives is followed once, and leads to a call that works.

``tests/project/advice`` has a table of cases for each area; ``NOT_FOLLOWED`` says of the others
why they are not followed. A new error needs an entry in one of them: its folder and a few words of
its hint.
"""

from __future__ import annotations

import re
import shutil

import pytest

import dinov2_attn
from tests.project.advice import (
    cli,
    datasets,
    engine,
    explaining,
    extraction,
    images,
    models,
    not_followed,
    recordings,
    registers,
    training,
    viz,
    weights,
)
from tests.project.advice.lab import Lab
from tests.support.advice import Hint, hints, unanswered

TABLES = (
    *(engine, recordings, explaining, weights, models, images, viz, extraction, datasets, cli),
    *(registers, training),
)
CASES = [case for table in TABLES for case in table.CASES]
NOT_FOLLOWED = not_followed.ENTRIES


@pytest.fixture
def lab(first, tmp_path):
    """A model, images, maps, files and the program."""
    first.module("dinov2.models.vision_transformer")
    dinov2_attn.install()
    return Lab(first, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("one", CASES, ids=str)
def test_a_call_that_follows_the_advice_works(lab, one):
    with pytest.raises(dinov2_attn.Dinov2AttnError) as caught:
        one.wrong(lab)
    lab.hint = caught.value.hint
    assert one.snippet in lab.hint
    assert one.right(lab) is not False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("command", "option", "value"), cli.PROPOSED)
def test_a_value_that_the_program_proposes_is_taken(lab, capsys, command, option, value):
    output = "page.html" if command == "explore" else "out"
    run = [command, lab.image, "-o", lab.folder / output, "--weights", lab.weights]
    with pytest.raises(SystemExit):
        lab.typed(*run, f"{option}={value}")
    proposal = re.search(r"Try (.+)\.$", capsys.readouterr().err.strip())[1]
    for proposed in proposal.split(" or "):
        shutil.rmtree(lab.folder / output, ignore_errors=True)
        lab.typed(*run, f"{option}={proposed}")


@pytest.mark.filterwarnings("ignore")
def test_files_are_put_before_the_queries_as_the_program_proposes(lab, capsys):
    run = ["-o", lab.folder / "out", "--weights", lab.weights, "--queries", "cls"]
    with pytest.raises(SystemExit):
        lab.typed("extract", *run, lab.image)
    assert "Put files before this option" in capsys.readouterr().err
    lab.typed("extract", lab.image, *run)


def test_the_advice_of_every_error_is_followed_or_excused():
    known = [(one.area, one.snippet) for one in CASES] + NOT_FOLLOWED
    missing = unanswered(hints(), known)
    assert not missing, "\n".join(map(str, missing))


def test_no_entry_outlives_its_error():
    every = hints()
    assert len(every) > 200
    known = [(one.area, one.snippet) for one in CASES] + NOT_FOLLOWED
    stale = [
        entry
        for entry in known
        if not any(hint.area == entry[0] and entry[1] in hint.text for hint in every)
    ]
    assert not stale


def test_hints_with_the_same_words_need_an_entry_each():
    every = [Hint("apps/viz/a.py", 1, "Leave it out."), Hint("apps/viz/b.py", 2, "Leave it out.")]
    entry = ("apps/viz", "Leave it out")
    assert unanswered(every, [entry, ("apps/viz", "out")]) == []
    assert unanswered(every, [entry]) == every[1:]
    assert unanswered(every, [entry, ("apps/cli", "Leave it out")]) == every[1:]
