"""`record` and graphs: what a compiled or exported model would have missed is refused."""

from __future__ import annotations

import pytest
import torch

from dinov2_attn import record
from dinov2_attn.errors import NotRecordedError
from tests.support.compiling import Graphs, asking, compiles, compiling_questions
from tests.support.recordings import IMAGES, assert_all_close, assert_nothing_on, build
from tests.support.tolerances import assert_close, assert_same_bits


def wholly(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def block_by_block(model, backend):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend=backend)
    return model


def attention_by_attention(model, backend):
    for block in model.blocks:
        block.attn.compile(backend=backend)
    return model


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("way", [wholly, in_place, block_by_block, attention_by_attention])
@pytest.mark.parametrize("first", ["compiled", "recorded"])
class TestCompiled:
    pytestmark = compiling_questions

    def test_a_compiled_model_is_refused_and_never_missed(self, grafted, way, first):
        model, graphs = build(grafted), Graphs()
        expected, weights = model(IMAGES), model.get_self_attention(IMAGES)
        compiled = way(model, graphs)
        if first == "compiled":
            assert_close(compiled(IMAGES), expected)
            assert graphs.runs
        for _ in range(2):
            with pytest.raises(NotRecordedError, match="_orig_mod"), record(compiled):
                compiled(IMAGES)
            with in_eager_mode(), record(compiled) as maps:
                assert_close(compiled(IMAGES), expected)
            assert_all_close(maps.weights, weights)
        graphs.runs = 0
        assert_close(compiled(IMAGES), expected)
        assert graphs.runs


def in_eager_mode():
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("this torch has no stances: the refusal before is what it gives")
    return torch.compiler.set_stance("force_eager")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("first", ["compiled", "recorded"])
class TestFullGraph:
    pytestmark = compiling_questions

    def test_a_single_graph_is_refused_and_works_again_afterwards(self, models, first):
        model, graphs = build(models), Graphs()
        expected = model(IMAGES)
        compiled = torch.compile(model, backend=graphs, fullgraph=True)
        if first == "compiled":
            assert_close(compiled(IMAGES), expected)
        with pytest.raises(NotRecordedError, match="_orig_mod"), record(compiled):
            compiled(IMAGES)
        graphs.runs = 0
        assert_close(compiled(IMAGES), expected)
        assert graphs.runs == 1
        with record(compiled) as maps:
            model(IMAGES)
        assert len(maps.passes) == 1

    def test_somebody_elses_graph_runs_inside(self, models, first):
        model, other = build(models), build(models, depth=1)
        compiled = torch.compile(other, backend="eager", fullgraph=True)
        if first == "compiled":
            compiled(IMAGES)
        with record(model) as maps:
            model(IMAGES)
            assert_close(compiled(IMAGES), other(IMAGES))
        assert len(maps.passes) == 1


@pytest.mark.usefixtures("fresh_dynamo")
class TestCompiledProjection:
    pytestmark = compiling_questions

    def test_a_projection_that_no_hook_reaches_is_refused(self, grafted):
        """Its graph was made when there was none."""
        model = build(grafted)
        model.blocks[1].attn.qkv.compile(backend="eager")
        expected = model(IMAGES)
        try:
            with record(model) as maps:
                assert_same_bits(model(IMAGES), expected)
        except NotRecordedError as error:
            assert "0 calls" in str(error)  # noqa: PT017  # a torch that guards hooks records
        else:
            assert_all_close(maps.weights, model.get_self_attention(IMAGES))
        assert_nothing_on(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    not (compiles() and hasattr(torch, "export")),
    reason="no torch.export here: test_machinery traces",
)
@asking
@pytest.mark.parametrize("strict", [True, False])
def test_exports_are_refused(grafted, strict):
    model = build(grafted)
    with pytest.raises(NotRecordedError, match="torch.export"), record(model):
        torch.export.export(model, (IMAGES,), strict=strict)
    assert_nothing_on(model)
    exported = torch.export.export(model, (IMAGES,), strict=strict).module()
    assert_close(exported(IMAGES), model(IMAGES))
    with pytest.raises(NotRecordedError, match="Found 0"), record(model):
        exported(IMAGES)


def test_function_transforms_are_refused(grafted):
    """What is recorded there would be wrappers that are dead afterwards."""
    model = build(grafted)
    with pytest.raises(NotRecordedError, match="torch.func"), record(model):
        torch.func.grad(lambda x: model(x).sum())(IMAGES)
    assert_nothing_on(model)
