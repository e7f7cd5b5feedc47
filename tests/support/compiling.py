"""What the tests of torch.compile share: whether it is here, and a backend that counts."""

from __future__ import annotations

import pytest
import torch


def compiles() -> bool:
    try:
        torch.compile(lambda x: x, backend="eager")(torch.ones(1))
    except RuntimeError:
        return False
    return True


# torch 2.0 has no torch.compile on Python 3.11.
compiling = [
    pytest.mark.skipif(
        not compiles(),
        reason="this torch cannot compile on this Python: eager calls run in every file",
    ),
    pytest.mark.filterwarnings("ignore"),  # Dynamo's own differ from version to version
]

# Before, Dynamo meets what it cannot follow in some questions and recordings, and raises errors
# of its own.
asking = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14),
    reason="graphs that are asked or recorded want torch 2.14: "
    "test_on_every_torch_a_graph_is_upstreams_or_an_error runs instead",
)

compiling_questions = [*compiling, asking]


class Graphs:
    """A backend that counts how often its graphs run."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, _):
        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run
