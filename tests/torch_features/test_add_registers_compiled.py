"""`add_registers` and graphs: a model with registers is refused, others are compiled as always."""

from __future__ import annotations

import pytest
import torch

from dinov2_attn import add_registers
from dinov2_attn.errors import NotEditedError
from tests.support import upstreams
from tests.support.compiling import Graphs, compiling_questions
from tests.support.recordings import IMAGES, build
from tests.support.tolerances import assert_close

pytestmark = [*compiling_questions, pytest.mark.usefixtures("fresh_dynamo")]


@pytest.mark.parametrize("first", ["compiled", "changed"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_is_refused_and_says_what_works(first, fullgraph):
    model, graphs = build(upstreams.LIGHTLY), Graphs()
    expected = model(IMAGES)
    compiled = torch.compile(model, backend=graphs, fullgraph=fullgraph)
    if first == "compiled":
        assert_close(compiled(IMAGES), expected)
    with pytest.raises(NotEditedError, match="_orig_mod"), add_registers(compiled, {1: [0]}):
        compiled(IMAGES)
    with add_registers(model, {1: [0]}):
        changed = model(IMAGES)
    with add_registers(compiled, {1: [0]}):
        assert_close(compiled._orig_mod(IMAGES), changed)
    if hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"), add_registers(compiled, {1: [0]}):
            assert_close(compiled(IMAGES), changed)
    graphs.runs = 0
    assert_close(compiled(IMAGES), expected)
    assert graphs.runs


def test_another_model_is_compiled_inside():
    model, other, graphs = build(upstreams.LIGHTLY), build(upstreams.LIGHTLY), Graphs()
    expected = other(IMAGES)
    compiled = torch.compile(other, backend=graphs, fullgraph=True)
    with add_registers(model, {1: [0]}):
        model(IMAGES)
        assert_close(compiled(IMAGES), expected)
    assert graphs.runs
    assert_close(compiled(IMAGES), expected)
