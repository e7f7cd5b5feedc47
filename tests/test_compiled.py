"""torch.compile on grafted models: one graph, before and after install."""

from __future__ import annotations

import pytest
import torch

from compiling import compiling
from recordings import IMAGES, build

pytestmark = [*compiling, pytest.mark.usefixtures("fresh_dynamo")]


def test_every_call_compiles_into_one_graph(models):
    model = build(models)
    calls = {
        "features": lambda x: model(x),
        "both": lambda x: model(x, return_attention=True),
        "last": lambda x: model.get_last_self_attention(x),
        "cls": lambda x: model.get_self_attention(x, queries="cls", heads="mean"),
    }
    for call in calls.values():
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(IMAGES), call(IMAGES))
