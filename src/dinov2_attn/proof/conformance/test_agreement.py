"""Invariant 5: all functions return the same attention, that of the forward pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from dinov2_attn.backbone.contract import options_of
from dinov2_attn.proof.conformance import reference
from dinov2_attn.proof.conformance.building import (
    MODEL_CASES,
    PLAIN,
    ModelCase,
    make,
    noise,
    randomise,
)
from dinov2_attn.proof.conformance.code import Code
from dinov2_attn.proof.conformance.tolerances import assert_close, assert_same_bits

# An attention module with its positional and its other arguments.
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def calls_of_attention(module: Any, run: Callable[[], object]) -> list[Call]:
    """Run, and return each call of an attention module with its arguments."""
    calls: list[Call] = []
    attentions = [m for m in module.modules() if hasattr(m, "qkv")]
    hooks = [
        m.register_forward_pre_hook(
            lambda m, args, kwargs: calls.append((m, args, kwargs)), with_kwargs=True
        )
        for m in attentions
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


def reference_of(call: Call) -> Tensor:
    """Return the reference weights of one call."""
    module, args, kwargs = call
    if kwargs.get("rope") is not None:
        return reference.weights_at_kernel(lambda: module(*args, **kwargs))
    return reference.true_weights(module, *args, **kwargs)


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_weights_are_those_of_the_models_own_pass(
    grafted: Code, model_class: type, case: ModelCase
) -> None:
    """For the inputs of each attention module in that pass, masks included."""
    model = case.build(grafted, model_class)
    calls = calls_of_attention(model, lambda: model(case.images, case.masks))
    answers = model.get_self_attention(case.images, masks=case.masks)
    assert len(answers) == case.depth, "expected an answer for each block"
    assert len(calls) == case.depth, "expected each block to attend once in a pass"
    for i, (answer, call) in enumerate(zip(answers, calls, strict=True)):
        assert_close(answer, reference_of(call), f"the weights of block {i} = those of its pass")


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_flat_equals_chunked(grafted: Code, model_class: type, case: ModelCase) -> None:
    """In attention, in features, in the layers that upstream counts, in names of parameters."""
    if not case.chunks or "block_chunks" not in options_of(model_class):
        pytest.skip("this model is not chunked")
    model, flat = (c.build(grafted, model_class) for c in (case, case.flat()))
    every, expected = (list(m.get_self_attention(case.images)) for m in (model, flat))
    assert_same_bits(expected, every, "attention of the chunked model = of the flat one")
    names = [re.sub(r"blocks\.\d+\.", "blocks.", name) for name in model.state_dict()]
    assert names == list(flat.state_dict()), "expected blocks to keep their number in a chunk"
    features = [m.forward_features(case.images)["x_prenorm"] for m in (model, flat)]
    assert_same_bits(features[1:], features[:1], "features of the chunked model = of the flat one")
    if hasattr(model, "get_intermediate_layers"):
        layers = [list(m.get_intermediate_layers(case.images, case.depth)) for m in (model, flat)]
        assert_same_bits(layers[0], layers[1], "layers of the chunked model = of the flat one")


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_n_takes_layers_as_get_intermediate_layers_does(
    grafted: Code, model_class: type, case: ModelCase
) -> None:
    """An int the last n, a sequence those, and the last has a name of its own."""
    model = case.build(grafted, model_class)
    every = list(model.get_self_attention(case.images))
    for n in range(case.depth + 1):
        last = list(model.get_self_attention(case.images, n))
        assert len(last) == n, f"expected the last {n}; found {len(last)}"
        if n:
            assert_close(last, every[-n:], f"n={n} = the last {n}")
        if n < case.depth:
            single = list(model.get_self_attention(case.images, n=[n]))
            assert_close(single, every[n : n + 1], f"n=[{n}] = block {n}")
    assert_close(model.get_last_self_attention(case.images), every[-1], "the last")


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_a_batch_equals_sample_by_sample(grafted: Code, model_class: type, case: ModelCase) -> None:
    """Images of a batch do not affect each other."""
    model = case.build(grafted, model_class)
    batch = model.get_last_self_attention(case.images, case.masks)
    for i in range(case.batch):
        one = model.get_last_self_attention(case.images[i : i + 1], case.masks[i : i + 1])
        assert_close(batch[i : i + 1], one, f"sample {i} of a batch = the sample alone")


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("case", MODEL_CASES[:3], ids=str)
def test_a_list_equals_one_by_one(
    grafted: Code, model_class: type, case: ModelCase, masked: bool
) -> None:
    """For batches of different sizes with images of different sizes."""
    model = case.build(grafted, model_class)
    images = [noise(1 + i, 3, 2 + 2 * i, 4, seed=i, dtype=case.dtype) for i in range(3)]
    masks = [noise(len(x), x[0, 0].numel() // 4, seed=9) > 0 for x in images] if masked else None
    answer = model.get_self_attention(images, masks=masks)
    assert len(answer) == case.depth
    for i, x in enumerate(images):
        one = model.get_self_attention(x, masks=None if masks is None else masks[i])
        same = [weights[i] for weights in answer]
        assert_close(same, list(one), f"element {i} of a list = the element alone")


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_features_and_attentions_come_from_one_pass(
    grafted: Code, model_class: type, case: ModelCase
) -> None:
    """The dict is upstream's with one more entry. The output is upstream's own."""
    model = case.build(grafted, model_class)
    plain = model.forward_features(case.images, case.masks)
    both = model.forward_features(case.images, case.masks, return_attention=True)
    attentions = list(both.pop("attentions"))
    assert plain.keys() == both.keys()
    tensors = [name for name, value in plain.items() if isinstance(value, Tensor)]
    assert_same_bits([both[n] for n in tensors], [plain[n] for n in tensors], "features")
    expected = list(model.get_self_attention(case.images, masks=case.masks))
    assert_close(attentions, expected, "attentions = get_self_attention")
    output, again = model(case.images, return_attention=True)
    assert_same_bits(output, model(case.images), "the output")
    assert_close(list(again), list(model.get_self_attention(case.images)), "attentions")


def test_a_block_answers_for_its_own_pass(grafted: Code, block_class: type) -> None:
    """Including the norm before the attention."""
    block, tokens = PLAIN.build(block_class)
    (call,) = calls_of_attention(block, lambda: block(tokens))
    answer = block(tokens, return_attention=True)
    assert_close(answer, reference_of(call), "the weights of a block = those of its pass")


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_causal_block_answers_for_its_own_pass(
    grafted: Code, causal_class: type, is_causal: bool
) -> None:
    """Causal or not, as the block was built."""
    if "is_causal" not in options_of(causal_class):
        pytest.skip("this block is not told whether to be causal")
    block = make(causal_class, dim=PLAIN.heads * 5, num_heads=PLAIN.heads, is_causal=is_causal)
    block = randomise(block.double(), 5)
    tokens = noise(2, 7, PLAIN.heads * 5, seed=5)
    (call,) = calls_of_attention(block, lambda: block(tokens))
    answer = block(tokens, return_attention=True)
    assert_close(answer, reference_of(call), "the weights of a causal block = its pass")
    assert bool(answer.triu(1).any()) != is_causal, "expected it to be causal where it is told so"
