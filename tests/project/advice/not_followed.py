"""Advice that no case follows: by the reason and the area, a few words of each."""

from __future__ import annotations

TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "needs xFormers in the process: test_bias and test_nested follow it": {
        "math": (
            "Pass the dense tensor of what is added to the scores",
            "Check heads and tokens",
            "Leave _batch_sizes at None",
            "Leave _batch_sizes at None",
            "Name the keys that each block of queries sees",
            "Concatenate the sequences along dimension 1",
        ),
        "kernels": (
            "import upstream without XFORMERS_DISABLED",
            "or pass attn_bias.materialize(",
            "build with drop_path_rate=0",
        ),
    },
}
ENTRIES = [
    (area, snippet)
    for areas in TABLE.values()
    for area, snippets in areas.items()
    for snippet in snippets
]
