"""Attention and block each have a flag of their own; every combination works or says why not."""

from __future__ import annotations

import pytest
import torch

from dinov2_attn.errors import InvalidInputError, NoOperatorError
from tests.kernels.test_nested import block_of, nest, tokens_of
from tests.support import reference, subprocesses, upstreams, xformers_visibility
from tests.support.strategies import ModelCase, noise
from tests.support.tolerances import assert_close
from tests.support.xformers_visibility import quiet

pytestmark = quiet

COMBINATIONS = [(True, True), (True, False), (False, True), (False, False)]
CASE = ModelCase(
    depth=3, chunks=0, registers=2, heads=2, grid=(2, 3), batch=2, dtype=torch.float64, seed=1
)


@pytest.fixture(params=COMBINATIONS, ids="attention-{0[0]}-block-{0[1]}".format)
def flags(request, nested, monkeypatch):
    attention, block = request.param
    monkeypatch.setattr(nested.module(nested.attention), "XFORMERS_AVAILABLE", attention)
    monkeypatch.setattr(nested.module(nested.block), "XFORMERS_AVAILABLE", block)
    return request.param


def test_lists_are_answered_whatever_the_flags_say(nested, flags):
    model = CASE.build(nested)
    images = [CASE.images, noise(1, 3, 2, 4, seed=5, dtype=CASE.dtype)]
    lists = model.get_self_attention(images)
    asked = model.forward_features(images, return_attention=True) if _lists_work(nested) else None
    for i, x in enumerate(images):
        for layer, one in enumerate(model.get_self_attention(x)):
            assert_close(lists[layer][i], one)
            if asked:
                assert_close(asked[i]["attentions"][layer], one)


def _lists_work(nested):
    return nested is not upstreams.MOGE  # see test_nested


def test_a_block_answers_a_list_whatever_the_flags_say(nested, flags):
    block, tokens = block_of(nested), tokens_of([(2, 5), (1, 3)], 24, 0)
    for ours, x in zip(block(tokens, return_attention=True), tokens, strict=True):
        assert_close(ours, reference.weights(block.attn, block.norm1(x)))


def test_a_bias_works_or_the_error_says_which_flag_said_what(nested, flags):
    attention, block = flags
    module, tokens = block_of(nested).attn, tokens_of([(2, 5), (1, 3)], 24, 0)
    bias, together = nest(nested, tokens)
    if attention:
        assert len(module(together, attn_bias=bias, return_attn=True)) == 2
        return
    with pytest.raises(InvalidInputError) as error:
        module(together, attn_bias=bias, return_attn=True)
    assert f"{nested.attention}.XFORMERS_AVAILABLE is {attention}" in str(error.value)
    assert f"{nested.block}.XFORMERS_AVAILABLE is {block}" in str(error.value)
    assert "XFORMERS_DISABLED is not set" in str(error.value)


def test_stochastic_depth_needs_cuda_only_where_upstream_would_nest(nested, flags):
    block, tokens = block_of(nested, drop_path=0.3).train(), tokens_of([(2, 5), (1, 3)], 24, 0)
    if all(flags):
        with pytest.raises(NoOperatorError, match="CUDA only"):
            block(tokens, return_attention=True)
    else:
        assert [len(w) for w in block(tokens, return_attention=True)] == [2, 1]


SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = sys.argv[1:]
import torch, dinov2_attn
dinov2_attn.install()
from functools import partial
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.layers import MemEffAttention, NestedTensorBlock
from dinov2.layers import attention, block
print(attention.XFORMERS_AVAILABLE, block.XFORMERS_AVAILABLE)
model = DinoVisionTransformer(
    img_size=4, patch_size=2, embed_dim=128, depth=2, num_heads=2,
    block_fn=partial(NestedTensorBlock, attn_class=MemEffAttention),
).eval()
images = [torch.ones(2, 3, 4, 6), torch.ones(1, 3, 2, 2)]
print([tuple(w.shape) for w in model.get_last_self_attention(images)])
print(tuple(model(images[0]).shape))
"""


@pytest.mark.parametrize("disabled", [False, True], ids=["", "XFORMERS_DISABLED"])
def test_a_process_that_starts_with_xformers_and_no_gpu_runs(tmp_path, disabled):
    """The first commit does not know XFORMERS_DISABLED: it takes xFormers all the same."""
    with xformers_visibility.visible():
        pass
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = upstreams.CHECKOUT or upstreams.fetch_wheel(upstreams.FIRST.wheel)
    environment = {"XFORMERS_DISABLED": "1"} if disabled else {}
    done = subprocesses.python(script, path, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    flags, shapes, features = done.stdout.splitlines()
    assert shapes == "[(2, 2, 7, 7), (1, 2, 2, 2)]"
    assert features == "(2, 128)"
    knows = "XFORMERS_DISABLED" in _source(upstreams.FIRST.attention)
    assert flags == ("False False" if disabled and knows else "True True")


def _source(module):
    import importlib
    import inspect

    return inspect.getsource(importlib.import_module(module))
