"""Lists of tensors: one by one without xFormers, through upstream's own nested pass with it.

The nested pass needs xFormers. xFormers has no kernel for CPUs, so the pass runs there only if
``install()`` gives upstream another kernel. Tests that cannot run are skipped, with the reason.
Lists are then processed one by one, which the first test here and ``test_agreement`` cover.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dinov2_attn
from dinov2_attn.backbone.backbone import Backbone
from dinov2_attn.backbone.structure import Role
from dinov2_attn.proof.conformance import reference
from dinov2_attn.proof.conformance.building import MODEL_CASES, PLAIN, noise
from dinov2_attn.proof.conformance.code import GATE, Code
from dinov2_attn.proof.conformance.tolerances import assert_close, assert_same_bits

DIM = PLAIN.heads * PLAIN.head_dim

# Two batches, of two and of one sequences, of different lengths.
TOKENS = [noise(2, 7, DIM, seed=1), noise(1, 4, DIM, seed=2)]
IMAGES = [noise(2, 3, 4, 6, seed=1), noise(1, 3, 8, 2, seed=2)]


def test_without_xformers_a_block_answers_a_list_one_by_one(
    grafted: Code, block_class: type
) -> None:
    """A list as input returns a list."""
    block, _ = PLAIN.build(block_class)
    answer = block(TOKENS, return_attention=True)
    assert isinstance(answer, list)
    one_by_one = [block(tokens, return_attention=True) for tokens in TOKENS]
    assert_close(answer, one_by_one, "the weights of a list = those one by one")


def test_a_model_that_takes_lists_answers_in_its_own_pass(grafted: Code, model_class: type) -> None:
    """Features are bit for bit those of the list, weights those of each batch alone."""
    model = MODEL_CASES[1].build(grafted, model_class)
    if not Backbone(model).takes_lists:
        pytest.skip("this code runs a list through xFormers, or not at all")
    plain = model.forward_features(IMAGES, [None, None])
    both = model.forward_features(IMAGES, [None, None], return_attention=True)
    for images, features, before in zip(IMAGES, both, plain, strict=True):
        attentions = list(features["attentions"])
        assert_same_bits(features["x_prenorm"], before["x_prenorm"], "features of a list")
        assert_close(attentions, list(model.get_self_attention(images)), "weights of a list")


@pytest.fixture(scope="module")
def nested(accepted: Code) -> Iterator[Code]:
    """Yield the code as it runs with xFormers, with the plugin installed."""
    code = accepted
    if not code.gates:
        pytest.skip("this code does not use xFormers: it has no nested pass")
    if not code.opened:
        pytest.skip("xFormers cannot be imported here: lists were answered one by one")
    with pytest.MonkeyPatch.context() as patch:
        for module in code.opened:
            patch.setattr(module, GATE, True)
        try:
            with dinov2_attn.install(code.package):
                _require_a_kernel(code)
                yield code
        except (NotImplementedError, dinov2_attn.errors.IncompatibleUpstreamError) as error:
            if "NotImplementedError" not in repr(error):
                raise
            pytest.skip("xFormers has no kernel for this device, and install() gave none")


def test_a_nested_block_runs_and_answers_as_one_by_one(nested: Code, block_class: Any) -> None:
    """Features and weights of the nested pass equal those of each tensor alone."""
    if not hasattr(block_class, "forward_nested"):
        pytest.skip("this block has no nested pass")
    block, _ = PLAIN.build(block_class, attn_class=nested.most_derived(Role.ATTENTION))
    features, weights = block(TOKENS), block(TOKENS, return_attention=True)
    assert len(features) == len(weights) == len(TOKENS), "expected an answer for each element"
    for i, tokens in enumerate(TOKENS):
        assert_close(features[i], block(tokens), f"nested features, element {i} = alone")
        expected = reference.true_weights(block.attn, block.norm1(tokens))
        assert_close(weights[i], expected, f"nested weights, element {i}")


def test_a_block_diagonal_bias_gives_a_list(nested: Code, block_class: Any) -> None:
    """One (b, heads, n, n) for each element of upstream's bias."""
    if not hasattr(block_class, "forward_nested"):
        pytest.skip("this block has no nested pass")
    block, _ = PLAIN.build(block_class, attn_class=nested.most_derived(Role.ATTENTION))
    bias, together = sys.modules[block_class.__module__].get_attn_bias_and_cat(TOKENS)
    weights = block.attn(together, attn_bias=bias, return_attn=True)
    output = bias.split(block.attn(together, attn_bias=bias))
    assert isinstance(weights, list)
    for i, tokens in enumerate(TOKENS):
        assert_close(
            weights[i], reference.true_weights(block.attn, tokens), f"weights of segment {i}"
        )
        if reference.is_at_kernel(block.attn):
            continue
        made = reference.features(block.attn, tokens, weights[i])
        size = reference.size_of_terms(block.attn, tokens)
        assert_close(made, output[i], f"proj(weights @ v) = features of segment {i}", size=size)


def test_a_model_runs_a_list_and_answers_as_one_by_one(nested: Code, model_class: type) -> None:
    """For a list of images, as upstream passes it."""
    model = MODEL_CASES[1].build(nested, model_class)
    attentions = model.get_self_attention(IMAGES)
    for i, images in enumerate(IMAGES):
        for layer, weights in enumerate(model.get_self_attention(images)):
            assert_close(attentions[layer][i], weights, f"block {layer}, images {i} = alone")


def test_features_of_a_list_are_those_of_each(nested: Code, model_class: type) -> None:
    """For the copy's own pass of a list, without attention."""
    model = MODEL_CASES[1].build(nested, model_class)
    try:
        features = model.forward_features(IMAGES, [None] * len(IMAGES))
    except (TypeError, ValueError) as error:  # MoGe unpacks three of two there
        pytest.skip(f"this copy's own forward_features of a list fails: {error}")
    for i, images in enumerate(IMAGES):
        alone = model.forward_features(images)["x_prenorm"]
        assert_close(features[i]["x_prenorm"], alone, f"nested features of images {i} = alone")


def _require_a_kernel(code: Code) -> Tensor:
    """Raise xFormers' ``NotImplementedError`` if its kernel cannot run."""
    module, tokens = PLAIN.build(code.classes(Role.ATTENTION)[-1])
    with torch.no_grad():
        output: Tensor = module(tokens)
    return output
