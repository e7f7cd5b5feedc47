"""Invariant 2: the returned attention is the one that made the features."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_attn.proof.conformance import reference
from dinov2_attn.proof.conformance.building import ATTENTION_CASES, PLAIN, AttentionCase, noise
from dinov2_attn.proof.conformance.code import Code
from dinov2_attn.proof.conformance.tolerances import assert_close, assert_same_bits, assert_shape


def assert_faithful(module: Any, weights: Tensor, tokens: Tensor, *args: Any, **kw: Any) -> None:
    """Fail unless ``weights`` made the features of this pass. Every wrong formula fails this."""
    __tracebackhide__ = True
    if reference.is_at_kernel(module):
        length = tokens.shape[1]
        assert_shape("the weights", weights, (len(tokens), module.num_heads, length, length))
        call = reference.kernel_call(module, tokens, *args, **kw)
        value, theirs = (
            t.reshape(*weights.shape[:2], *t.shape[-2:]) for t in (call.value, call.output)
        )
        size = float(value.abs().max()) + 1
        made = weights.detach().double() @ value
        assert_close(made, theirs, "weights @ v = kernel's output", dtype=tokens.dtype, size=size)
        return
    output = module(tokens, *args, **kw)
    made = reference.features(module, tokens, weights)
    size = reference.size_of_terms(module, tokens)
    assert_close(made, output, "proj(weights @ v) = features", dtype=output.dtype, size=size)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_weights_times_values_projected_are_the_features(
    grafted: Code, attention_class: type, case: AttentionCase, training: bool
) -> None:
    """For the module's own output, with any kernel."""
    module, tokens = case.build(attention_class)
    module.train(training)
    assert_faithful(module, module(tokens, return_attn=True), tokens)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_weights_equal_a_reference_that_shares_no_code(
    grafted: Code, attention_class: type, case: AttentionCase
) -> None:
    """For each weight, in the dtype of the kernel."""
    module, tokens = case.build(attention_class)
    weights = module(tokens, return_attn=True)
    assert weights.dtype == case.dtype
    expected = reference.true_weights(module, tokens)
    assert_close(weights, expected, "weights = softmax(q kᵀ · scale)", dtype=case.dtype)


def test_dropout_is_for_training_and_weights_are_those_before_it(
    grafted: Code, attention_class: type
) -> None:
    """A kernel that gets the wrong probability would drop in evaluation too."""
    module, tokens = PLAIN.build(attention_class, attn_drop=0.5, proj_drop=0.5)
    torch.manual_seed(0)
    evaluated = module(tokens, return_attn=True)
    assert_faithful(module, evaluated, tokens)
    state = torch.get_rng_state()
    trained = module.train()(tokens, return_attn=True)
    if not reference.is_at_kernel(module):  # there the module's own pass runs
        assert_same_bits(torch.get_rng_state(), state, "the state of the random generator")
    assert_close(trained, evaluated, "weights in training = weights in evaluation")


def test_causal_weights_are_those_of_causal_features(grafted: Code, attention_class: Any) -> None:
    """With a positional argument, as in upstream's own causal block."""
    module, tokens = PLAIN.build(attention_class)
    if "is_causal" not in inspect.signature(attention_class.forward).parameters:
        pytest.skip("this forward takes no is_causal")
    weights = module(tokens, True, return_attn=True)
    assert_faithful(module, weights, tokens, True)
    assert_close(weights, reference.true_weights(module, tokens, True), "causal weights")


def test_a_dense_bias_joins_the_scores(grafted: Code, attention_class: type) -> None:
    """For code that accepts a bias without xFormers, as several copies do."""
    module, tokens = PLAIN.build(attention_class)
    bias = noise(PLAIN.batch, PLAIN.heads, PLAIN.length, PLAIN.length, seed=1)
    try:
        module(tokens, attn_bias=bias)
    except (TypeError, AssertionError) as error:
        pytest.skip(f"this forward takes no bias here: {error}")
    weights = module(tokens, attn_bias=bias, return_attn=True)
    assert_faithful(module, weights, tokens, attn_bias=bias)
    expected = reference.true_weights(module, tokens, attn_bias=bias)
    assert_close(weights, expected, "biased weights")


def test_hooks_on_the_projection_change_the_weights(grafted: Code, attention_class: type) -> None:
    """Adapters and quantised layers change the input of the kernel."""
    module, tokens = PLAIN.build(attention_class)
    module.qkv.register_forward_hook(lambda _, __, out: out * 2)
    assert_faithful(module, module(tokens, return_attn=True), tokens)


def test_gradients_flow_through_the_weights(grafted: Code, attention_class: type) -> None:
    """Checked by finite differences with grad. Without grad, the weights need none."""
    module, tokens = PLAIN.build(attention_class)

    def asked(x: Tensor) -> Any:
        return module(x, return_attn=True)

    assert torch.autograd.gradcheck(asked, (tokens.requires_grad_(),), fast_mode=True)
    with torch.no_grad():
        assert not asked(tokens).requires_grad


def _is_causal(cls: Any) -> bool:
    """Return whether attention of ``cls`` is causal unless it is asked not to be."""
    argument = inspect.signature(cls.forward).parameters.get("is_causal")
    return argument is not None and argument.default is True
