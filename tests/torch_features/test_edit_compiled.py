"""`edit` and graphs: what a compiled or exported model would have missed is refused."""

from __future__ import annotations

import pytest
import torch

from dinov2_attn import edit
from dinov2_attn.errors import NotEditedError
from tests.support import upstreams
from tests.support.compiling import Graphs, compiling_questions
from tests.support.edits import nothing_left
from tests.support.recordings import IMAGES, build
from tests.support.strategies import noise
from tests.support.tolerances import assert_close


class TestGraphs:
    pytestmark = compiling_questions

    @pytest.mark.usefixtures("fresh_dynamo")
    @pytest.mark.parametrize("first", ["compiled", "edited"])
    @pytest.mark.parametrize("fullgraph", [False, True])
    def test_a_compiled_model_is_refused_and_says_what_works(self, first, fullgraph):
        model, graphs = build(upstreams.FIRST), Graphs()
        expected = model(IMAGES)
        compiled = torch.compile(model, backend=graphs, fullgraph=fullgraph)
        if first == "compiled":
            assert_close(compiled(IMAGES), expected)
        with pytest.raises(NotEditedError, match="_orig_mod"), edit(compiled, heads={1: 0}):
            compiled(IMAGES)
        with edit(model, heads={1: 0}):
            edited = model(IMAGES)
        with edit(compiled, heads={1: 0}):
            assert_close(compiled._orig_mod(IMAGES), edited)
        if hasattr(torch.compiler, "set_stance"):
            with torch.compiler.set_stance("force_eager"), edit(compiled, heads={1: 0}):
                assert_close(compiled(IMAGES), edited)
        graphs.runs = 0
        assert_close(compiled(IMAGES), expected)
        assert graphs.runs

    def test_an_export_inside_is_refused(self):
        model = build(upstreams.FIRST)
        with (
            nothing_left(model),
            pytest.raises(NotEditedError, match="_orig_mod"),
            edit(model, heads={1: 0}),
        ):
            torch.export.export(model, (IMAGES,))

    def test_a_transform_is_refused(self):
        model = build(upstreams.FIRST)
        with pytest.raises(NotEditedError, match=r"torch\.func"), edit(model, heads={1: 0}):
            torch.func.grad(lambda images: model(images).sum())(IMAGES)

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_a_graph_that_asks_is_refused(self, grafted):
        model = build(grafted)
        ask = torch.compile(model.get_last_self_attention, backend="eager", fullgraph=True)
        with pytest.raises(NotEditedError, match="_orig_mod"), edit(model, heads={1: 0}):
            ask(IMAGES)
        weights = torch.func.grad(lambda x: model.blocks[1].attn(x, return_attn=True)[0, 0, 0, 1])
        tokens = noise(1, 5, 8, seed=3, dtype=torch.float64)
        weights(tokens)
        with pytest.raises(NotEditedError, match=r"torch\.func"), edit(model, heads={1: 0}):
            weights(tokens)
