"""Installing where modes, defaults and hooks are on: proofs are made apart from them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as nn_module

import dinov2_attn
from tests.support.bit_identity import one_pass
from tests.support.recordings import IMAGES, build
from tests.support.tolerances import assert_close, assert_same_bits


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def hook_on_everything():
    """A profiler's: it must not see half of a proof, nor break one."""
    hook = nn_module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        hook.remove()


MODES = {
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "fake": FakeTensorMode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "hook": hook_on_everything,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_around_install_changes_nothing_afterwards(first, mode):
    model = build(first)
    expected = one_pass(model)
    with dinov2_attn.install():
        weights = model.get_self_attention(IMAGES)
    with MODES[mode]():
        dinov2_attn.install()
    assert_same_bits(one_pass(model), expected)
    assert_close(model.get_self_attention(IMAGES), weights)
    model.get_last_self_attention(IMAGES).square().sum().backward()
