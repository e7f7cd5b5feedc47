"""Every advice that an error gives is followed once, and leads to a call that works.

``tests/project/advice`` has a table of cases for each area; ``NOT_FOLLOWED`` says of the others
why they are not followed. A new error needs an entry in one of them: its folder and a few words of
its hint.
"""

from __future__ import annotations

import pytest

import dinov2_attn
from tests.project.advice import cli, engine, extraction, images, not_followed, viz, weights
from tests.project.advice.lab import Lab
from tests.support.advice import Hint, hints, unanswered

CASES = [case for table in (engine, weights, images, viz, extraction, cli) for case in table.CASES]
NOT_FOLLOWED = not_followed.ENTRIES


@pytest.fixture
def lab(first, tmp_path):
    """A model, images, maps, files and the program."""
    first.module("dinov2.models.vision_transformer")
    dinov2_attn.install()
    return Lab(first, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("one", CASES, ids=str)
def test_the_advice_leads_to_a_call_that_works(lab, one):
    with pytest.raises(dinov2_attn.Dinov2AttnError) as caught:
        one.wrong(lab)
    lab.hint = caught.value.hint
    assert one.snippet in lab.hint
    assert one.right(lab) is not False


def test_every_error_is_followed_or_says_why_not():
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
