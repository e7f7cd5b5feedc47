"""Invariant 1: without return_attention, all outputs are bit for bit those without the plugin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dinov2_attn
from dinov2_attn.proof.conformance.building import (
    ATTENTION_CASES,
    MODEL_CASES,
    PLAIN,
    AttentionCase,
    ModelCase,
    noise,
)
from dinov2_attn.proof.conformance.code import Code
from dinov2_attn.proof.conformance.tolerances import assert_same_bits


def run(module: Any, inputs: Tensor, **options: Any) -> list[Tensor]:
    """Return outputs, random state and gradients of one forward and backward pass."""
    torch.manual_seed(0)
    module.zero_grad()
    inputs = inputs.clone().requires_grad_()
    output = module(inputs, **options)
    parts = output.values() if isinstance(output, dict) else [output]
    outputs = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
    loss: Any = torch.stack([part.double().square().sum() for part in outputs]).sum()
    loss.backward()
    gradients = [x.grad for x in (inputs, *module.parameters()) if x.grad is not None]
    return [*outputs, torch.get_rng_state(), *gradients]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_an_attention_module_is_bit_identical(
    ungrafted: Code, attention_class: type, case: AttentionCase, training: bool
) -> None:
    """Including dropout and its random numbers."""
    module, tokens = case.build(attention_class, attn_drop=0.2, proj_drop=0.1)
    module.train(training)
    before = run(module, tokens)
    with dinov2_attn.install(ungrafted.package):
        assert_same_bits(run(module, tokens), before, "the features as before install")
        again = run(module, tokens, return_attn=False)
        assert_same_bits(again, before, "the features of return_attn=False")
    assert_same_bits(run(module, tokens), before, "the features as before, after uninstall")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_block_is_bit_identical(ungrafted: Code, block_class: type, training: bool) -> None:
    """Including stochastic depth."""
    block, tokens = PLAIN.build(block_class, drop_path=0.5)
    block.train(training)
    before = run(block, tokens)
    with dinov2_attn.install(ungrafted.package):
        assert_same_bits(run(block, tokens), before, "the tokens as before install")


@pytest.mark.parametrize("drop_path", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_a_model_is_bit_identical(
    ungrafted: Code, model_class: type, case: ModelCase, drop_path: float
) -> None:
    """In training, with masks and stochastic depth, and in evaluation."""
    options = {"drop_path_rate": drop_path, "drop_path_uniform": True}
    model = case.build(ungrafted, model_class, **options)

    def everything() -> list[Tensor]:
        training = run(model.train(), case.images, masks=case.masks, is_training=True)
        return training + run(model.eval(), case.images)

    before = everything()
    with dinov2_attn.install(ungrafted.package):
        assert_same_bits(everything(), before, "the features as before install")


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_intermediate_layers_are_bit_identical(
    ungrafted: Code, model_class: type, case: ModelCase
) -> None:
    """The method has its own loops over blocks and chunks."""
    model = case.build(ungrafted, model_class)
    if not hasattr(model, "get_intermediate_layers"):
        pytest.skip("this model has no get_intermediate_layers")
    before = list(model.get_intermediate_layers(case.images, n=1))
    with dinov2_attn.install(ungrafted.package):
        after = list(model.get_intermediate_layers(case.images, n=1))
    assert_same_bits(after, before, "intermediate layers as before install")


MISUSES: dict[str, Callable[[Any], object]] = {
    "half a patch": lambda m: m(noise(2, 3, 5, 4, seed=0)),
    "four channels": lambda m: m(noise(2, 4, 4, 4, seed=0)),
    "a list without xFormers": lambda m: m([noise(2, 3, 4, 4, seed=0)], [None]),
    "an argument of the plugin without return_attention": lambda m: m(
        noise(2, 3, 4, 4, seed=0), queries="cls"
    ),
    "a positional argument too many": lambda m: m.blocks[0](noise(2, 5, 8, seed=0), True),
    "no tokens": lambda m: m.blocks[0].attn("tokens"),
    "nothing": lambda m: m(),
}


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES)
def test_exceptions_are_the_same(
    ungrafted: Code, model_class: type, misuse: Callable[[Any], object]
) -> None:
    """Including their type and message."""
    model = MODEL_CASES[0].build(ungrafted, model_class)
    before = _outcome(misuse, model)
    with dinov2_attn.install(ungrafted.package):
        assert _outcome(misuse, model) == before


def _outcome(misuse: Callable[[Any], object], model: Any) -> tuple[type | None, str]:
    try:
        misuse(model)
    except Exception as error:
        return type(error), str(error)
    return None, ""
