"""The truth finds kernels wherever a model calls them, and checks itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support import reference, upstreams
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close
from tests.wild.compare import Report, compare
from tests.wild.truth import SDPA, TruthError, attention_of

TOKENS = noise(2, 5, 12, seed=0, dtype=torch.float64)


class Attention(nn.Module):
    """Softmax attention that calls ``kernel``, which tests choose."""

    def __init__(self, kernel):
        super().__init__()
        self.qkv = nn.Linear(12, 36).double()
        self.kernel = kernel

    def forward(self, tokens):
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        return self.kernel(q, k, v)


def explicit(q, k, v):
    return functional.dropout((q @ k.mT).softmax(-1), 0.0) @ v


def by_einsum(q, k, v):
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k), -1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def by_bmm(q, k, v):
    weights = functional.softmax(q.flatten(0, 1) @ k.flatten(0, 1).mT, dim=-1)
    return torch.bmm(weights, v.flatten(0, 1))


def of_clone(q, k, v):
    weights = (q @ k.mT).softmax(-1).clone()
    weights[..., 0] = 0.0
    return weights @ v


def caught(kernel):
    module = Attention(kernel)
    return attention_of(nn.Sequential(module), lambda model: model(TOKENS))


@pytest.mark.parametrize("copy", upstreams.WITH_MODELS, ids=str)
def test_truth_is_the_reference_on_upstreams_module(copy):
    module = copy.cls("Attention")(12, num_heads=2).double()
    randomise(module, 0)
    (call,) = attention_of(module, lambda model: model(TOKENS))
    assert_close(call.weights, reference.weights(module, TOKENS))


@pytest.mark.parametrize("kernel", [explicit, by_einsum, by_bmm, of_clone])
def test_an_explicit_softmax_is_caught_at_its_product(kernel):
    (call,) = caught(kernel)
    assert (call.path, call.kernel) == ("0", "softmax")


def test_a_kernel_kept_as_an_attribute_is_caught():
    (call,) = caught(SDPA)
    assert (call.path, call.kernel) == ("0", "sdpa")


def test_weights_are_those_that_multiply_the_values():
    (call,) = caught(of_clone)
    assert_close(call.weights[..., 0], torch.zeros_like(call.weights[..., 0]))


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"attn_mask": torch.eye(5, dtype=torch.bool)},
        *([] if torch.__version__ < "2.1" else [{"scale": 0.3}]),
    ],
    ids=str,
)
def test_what_the_kernel_is_given_besides_counts(options):
    (call,) = caught(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, **options))
    assert call.error < 1e-12


def test_a_call_that_goes_past_the_names_is_an_error():
    def hidden(q, k, v, kernel=SDPA):
        return kernel(q, k, v)

    with pytest.raises(TruthError, match="went past the replaced names"):
        caught(hidden)


def test_names_and_hooks_are_put_back():
    caught(SDPA)
    with pytest.raises(ZeroDivisionError):
        attention_of(nn.Identity(), lambda model: 1 / 0)
    assert functional.scaled_dot_product_attention is SDPA
    assert not nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (lambda w: {"0": [w]}, "equal to 0e+00"),
        (lambda w: {"0": [w.flip(1)]}, "WRONG by"),
        (lambda w: {"0": [w, w]}, "WRONG: 1 answers without a kernel call"),
        (lambda w: {}, "WRONG: no call was answered"),
        (lambda w: {"1": [w]}, "WRONG: 1 answers without a kernel call"),
    ],
)
def test_the_comparison_notices_what_is_wrong(answer, verdict):
    truth = caught(explicit)
    report = Report("a", "b", "c", "d", calls=1, features_identical=True)
    compare(report, truth, answer(truth[0].weights))
    assert report.verdict.startswith(verdict)
