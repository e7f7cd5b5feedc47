"""torch.compile on grafted models: upstream's own graphs, before, after and without install."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

import dinov2_attn
from dinov2_attn import record
from dinov2_attn.errors import NotRecordedError
from tests.support.bit_identity import assert_unchanged, one_pass
from tests.support.compiling import Graphs, asking, compiling
from tests.support.recordings import IMAGES, assert_all_close, build
from tests.support.tolerances import assert_close, assert_same_bits

pytestmark = [*compiling, pytest.mark.usefixtures("fresh_dynamo")]


class Kept:
    """A backend that keeps what its graphs consist of."""

    def __init__(self):
        self.nodes = []

    def __call__(self, graph, _):
        self.nodes.append([(node.op, str(node.target)) for node in graph.graph.nodes])
        return graph.forward


@asking
def test_every_call_compiles_into_one_graph(models):
    model = build(models, depth=2)
    calls = {
        "both": lambda x: model(x, return_attention=True),
        "last": lambda x: model.get_last_self_attention(x),
        "cls": lambda x: model.get_self_attention(x, queries="cls", heads="mean"),
    }
    for call in calls.values():
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        assert_close(compiled(IMAGES), call(IMAGES))


def test_features_compile_into_the_very_graph_of_upstream(first):
    """Same operations in the same order: grafts leave nothing in it."""
    model = build(first, depth=2)
    graphs = []

    def run():
        torch._dynamo.reset()
        graphs.append(Kept())
        return one_pass(torch.compile(model, fullgraph=True, backend=graphs[-1]))

    assert_close(assert_unchanged(run), one_pass(model))
    assert graphs[0].nodes == graphs[1].nodes
    assert len(graphs[0].nodes[0]) > 20


def test_on_every_torch_a_graph_is_upstreams_or_an_error(first):
    """What a compiled model cannot be asked on an old torch leaves it as it was."""
    model = build(first, depth=2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = one_pass(model)
    with dinov2_attn.install():
        weights = model.get_self_attention(IMAGES)
        for _ in range(2):
            assert_close(one_pass(compiled), before)
            _right_or_refused(lambda: _recorded(model, compiled), weights, Exception)
            _right_or_refused(
                lambda: compiled(IMAGES, return_attention=True)[1], weights, Exception
            )
            with record(model) as maps:
                assert_same_bits(one_pass(model), before)
            assert_all_close(maps.weights, weights)
    assert_close(one_pass(compiled), before)


def _recorded(model, compiled):
    with record(model) as maps:
        compiled(IMAGES)
    return maps.weights


@asking
def test_a_model_compiled_before_install_works_on_and_is_never_half_asked(first):
    model = build(first, depth=2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = one_pass(compiled)
    with dinov2_attn.install():
        assert_same_bits(one_pass(compiled), before)
        expected = model.get_self_attention(IMAGES)
        assert_close(compiled.get_self_attention(IMAGES), expected)
        with pytest.raises(NotRecordedError), record(compiled):
            compiled(IMAGES)
        _right_or_refused(lambda: compiled(IMAGES, return_attention=True)[1], expected)
    assert_same_bits(one_pass(compiled), before)


@asking
@pytest.mark.parametrize("where", ["blocks", "attention"])
def test_parts_compiled_before_install_are_never_half_asked(first, where):
    model = build(first, depth=2)
    for i, block in enumerate(model.blocks):
        if where == "blocks":
            model.blocks[i] = torch.compile(block, backend="eager")
        else:
            block.attn = torch.compile(block.attn, backend="eager")
    before = one_pass(model)
    with dinov2_attn.install():
        expected = build(first, depth=2).get_self_attention(IMAGES)
        assert_same_bits(one_pass(model), before)
        _right_or_refused(lambda: model.get_self_attention(IMAGES), expected)
        _right_or_refused(lambda: model(IMAGES, return_attention=True)[1], expected)
        with pytest.raises(NotRecordedError), record(model):
            model(IMAGES)
        assert_same_bits(one_pass(model), before)


@asking
def test_a_model_in_training_answers_from_one_graph(models):
    """As a model is that nobody called eval() on."""
    model = build(models).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    output, attentions = compiled(IMAGES, return_attention=True)
    assert_close(output, model(IMAGES))
    assert_all_close(attentions, model.get_self_attention(IMAGES))


@asking
@pytest.mark.parametrize("where", ["norm1", "attn", "attn.qkv"])
def test_what_draws_before_the_kernel_is_drawn_once(grafted, where):
    model = build(grafted).train()
    for block in model.blocks:
        layer = block.get_submodule(where)
        layer.register_forward_pre_hook(lambda _, args: F.dropout(args[0], 0.5))
    torch.manual_seed(3)
    before = model(IMAGES)
    compiled = torch.compile(model, backend="eager")
    torch.manual_seed(3)
    output, _ = compiled(IMAGES, return_attention=True)
    assert_close(output, before)


@asking
def test_blocks_compiled_one_by_one_share_a_graph(models):
    """As upstream's own do: PyTorch stops at the eighth, with an error where graphs are whole."""
    model, backend = build(models, depth=4), Kept()
    with torch.no_grad():
        before, expected = model(IMAGES), model.get_self_attention(IMAGES)
        for block in model.blocks:
            block.compile(backend=backend, fullgraph=True)
        for _ in range(2):
            assert_close(model(IMAGES), before)
            output, attentions = model(IMAGES, return_attention=True)
            assert_close(output, before)
            assert_all_close(attentions, expected)
            features = model.forward_features(IMAGES, return_attention=True)
            assert_all_close(features["attentions"], expected)
            assert_all_close(model.get_self_attention(IMAGES), expected)
    assert len(backend.nodes) == 3  # of features, of both, of weights


@asking
def test_a_recording_inside_of_what_is_compiled(grafted):
    """Right maps, where Dynamo leaves the graph for it, or a refusal."""
    model = build(grafted, depth=2)
    expected = model.get_self_attention(IMAGES)

    def inside(images):
        with record(model) as maps:
            model(images)
        return maps.weights

    _right_or_refused(lambda: torch.compile(inside, backend="eager")(IMAGES), expected)


@asking
def test_a_thread_that_records_meets_the_graph_of_one_that_did_not(grafted):
    """The switch is one for each thread, and so is what Dynamo looks at."""
    model, graphs, caught = build(grafted, depth=2), Graphs(), []
    compiled = torch.compile(model, backend=graphs)
    expected = compiled(IMAGES)

    def work():
        try:
            with record(model):
                compiled(IMAGES)
        except Exception as error:  # looked at below, out of the thread
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [type(error) for error in caught] == [NotRecordedError]
    graphs.runs = 0
    assert_same_bits(compiled(IMAGES), expected)
    assert graphs.runs


@asking
def test_sizes_that_change(grafted):
    """Weights of each batch and no other's, whatever Dynamo makes symbolic."""
    model = build(grafted, depth=2)
    compiled = torch.compile(model.get_last_self_attention, backend="eager", dynamic=True)
    for images in (IMAGES, IMAGES[:1], IMAGES.repeat(3, 1, 1, 1), IMAGES[..., :4], IMAGES):
        assert_all_close([compiled(images)], [model.get_last_self_attention(images)])


# A stale forward takes no such keyword.
REFUSED = (dinov2_attn.Dinov2AttnError, TypeError)


def _right_or_refused(ask, expected, refused=REFUSED):
    """Right, or an error: what must not be is an answer of something else."""
    try:
        answers = ask()
    except refused:
        return
    assert_all_close(answers, expected)
