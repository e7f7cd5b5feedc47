"""Copies, pickles and states of grafted models are those of upstream's."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import dinov2_attn
from dinov2_attn._download import fetch_wheel
from tests.support import upstreams
from tests.support.recordings import IMAGES, build
from tests.support.strategies import noise
from tests.support.subprocesses import python
from tests.support.tolerances import are_close, assert_close, assert_same_bits

WHOLE = {} if torch.__version__ < "2.1" else {"weights_only": False}


def test_copies_and_pickles_answer_alike(models):
    model = build(models)
    expected = model.get_last_self_attention(IMAGES)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = copy.deepcopy(model), torch.load(buffer, **WHOLE), pickle.loads(pickle.dumps(model))
    for twin in twins:
        assert_close(twin.get_last_self_attention(IMAGES), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(noise(*parameter.shape, seed=1))
        assert not are_close(twin.get_last_self_attention(IMAGES), expected)
    assert_close(model.get_last_self_attention(IMAGES), expected)


@pytest.mark.parametrize("chunks", [0, 3])
def test_states_are_the_same(models, chunks):
    """Keys in their order, values and the versions that modules write beside them."""
    model = build(models, block_chunks=chunks)
    during = model.state_dict()
    model(IMAGES, return_attention=True)
    with dinov2_attn.record(model):
        model(IMAGES)
    after = model.state_dict()
    dinov2_attn.uninstall()
    try:
        before = model.state_dict()
        fresh = build(models, block_chunks=chunks).state_dict()
    finally:
        dinov2_attn.install(models.package)
    for state in (during, after, fresh):
        assert list(state) == list(before)
        assert state._metadata == before._metadata
        assert_same_bits(list(state.values()), list(before.values()))


# What another process does with a whole model: loads, runs and saves it.
ANOTHER = """
import sys
sys.modules["xformers"] = None
import torch
torch.set_num_threads(1)
folder, options, plugin = sys.argv[1], eval(sys.argv[2]), sys.argv[3] == "plugin"
if plugin:
    import dinov2_attn
    dinov2_attn.install()
model = torch.load(f"{folder}/given.pt", **options)
images = torch.load(f"{folder}/images.pt")
answers = [model(images)]
if plugin:
    answers += model.get_self_attention(images)
assert ("dinov2_attn" in sys.modules) == plugin
torch.save(model, f"{folder}/returned.pt")
torch.save(answers, f"{folder}/answers.pt")
"""


@pytest.mark.parametrize("there", ["plain", "plugin"])
def test_whole_models_travel_to_and_from_a_process_without_the_plugin(first, there, tmp_path):
    """Nothing that is pickled names this package, and what comes back is grafted here."""
    upstream = upstreams.CHECKOUT or fetch_wheel(first.wheel)
    model = build(first)
    expected = model(IMAGES)
    if there == "plain":
        dinov2_attn.install()
        model(IMAGES, return_attention=True)  # which leaves nothing on it
        with dinov2_attn.record(model):
            model(IMAGES)
    torch.save(IMAGES, tmp_path / "images.pt")
    torch.save(model, tmp_path / "given.pt")
    assert b"dinov2_attn" not in (tmp_path / "given.pt").read_bytes()
    arguments = ("-W", "ignore", "-c", ANOTHER, tmp_path, WHOLE, there)
    path = [upstream, *map(str, dinov2_attn.__path__[0].rpartition("/")[:1])]
    done = python(*arguments, cwd=tmp_path, PYTHONPATH=":".join(map(str, path)))
    assert done.returncode == 0, done.stderr
    returned = torch.load(tmp_path / "returned.pt", **WHOLE)
    answers = torch.load(tmp_path / "answers.pt", **WHOLE)
    assert_close(returned(IMAGES), expected)
    assert_close(answers[0], expected)
    dinov2_attn.install()
    weights = model.get_self_attention(IMAGES)
    assert_close(returned.get_self_attention(IMAGES), weights)
    if there == "plugin":
        assert_close(answers[1:], weights)


def test_methods_pickle_by_their_names(grafted):
    """As upstream's own do: a pool of workers is given ``model.forward`` and the like."""
    model = build(grafted)
    for name in ("forward", "forward_features", "prepare_tokens_with_masks"):
        function = getattr(type(model), name)
        assert pickle.loads(pickle.dumps(function)) is function
    method = pickle.loads(pickle.dumps(model.get_last_self_attention))
    assert_close(method(IMAGES), model.get_last_self_attention(IMAGES))
