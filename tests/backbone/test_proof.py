"""The proof at install: what is not proved plain attention is taken at its kernel.

What a kernel-going class returns in every way is in ``tests/grafting/test_at_kernel.py``.
"""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dinov2_attn
from dinov2_attn.backbone.proof import measure_kernel, prove_attention, sandbox
from dinov2_attn.backbone.structure import Role, role_of_module
from dinov2_attn.errors import (
    IncompatibleUpstreamError,
    InvalidInputError,
    NotGraftedError,
    NotRecordedError,
)
from dinov2_attn.kernels.branches import branches
from tests.support import reference, upstreams
from tests.support.other_attention import attend, inputs_of
from tests.support.recordings import assert_all_close
from tests.support.strategies import noise
from tests.support.tolerances import assert_close


@pytest.fixture(autouse=True)
def _clean():
    yield
    dinov2_attn.uninstall()


def plain(cls, **options):
    return cls(12, num_heads=2, **options)


def reason(cls):
    """Why the weights of ``cls`` are taken at the kernel."""
    return dinov2_attn.status().at_kernel[f"{cls.__module__}.{cls.__qualname__}"]


@pytest.mark.parametrize("upstream", upstreams.ALL, ids=str)
def test_upstream_and_its_copies_go_by_their_projection(upstream):
    """Graphs need it, and few rows are faster. Where a proof fails, answers are right all the same,
    so that no other test would see it."""
    for module in filter(None, (upstream.attention, upstream.block, upstream.model)):
        upstream.module(module)
    with dinov2_attn.install(upstream.package):
        status = dinov2_attn.status()
    assert (status.at_kernel, status.left_out) == ({}, {})


@pytest.mark.parametrize("upstream", upstreams.ALL, ids=str)
def test_a_scale_that_is_changed_later_counts_where_the_kernel_uses_it(upstream):
    """Some revisions read it in each pass, and others leave the scale to PyTorch."""
    for cls in upstream.attentions:
        module, tokens = plain(cls).double(), noise(2, 5, 12, seed=0, dtype=torch.float64)
        with dinov2_attn.install(module):
            module.scale = module.scale * 3
            weights = module(tokens, return_attn=True)
            assert_close(reference.features(module, tokens, weights), module(tokens))


def test_another_meaning_of_causal_is_taken_at_the_kernel():
    class Attention(upstreams.ANOMALIB.cls("Attention")):
        def forward(self, x, is_causal=False):
            if not is_causal:
                return super().forward(x)
            return super().forward(x.flip(1), True).flip(1)  # the past hidden, not the future

    module, tokens = plain(Attention), noise(1, 5, 12, seed=0)
    with dinov2_attn.install(module):
        assert reason(Attention).startswith("expected causal attention to equal")
        weights = module(tokens, True, return_attn=True)
        assert_close(weights, reference.weights(module, tokens.flip(1), causal=True))


def test_another_meaning_of_the_bias_is_taken_at_the_kernel():
    class Attention(upstreams.MOGE.cls("Attention")):
        def forward(self, x, attn_bias=None):
            return super().forward(x, None if attn_bias is None else -attn_bias)

    module, tokens, bias = plain(Attention), noise(1, 5, 12, seed=0), noise(1, 2, 5, 5, seed=1)
    with dinov2_attn.install(module):
        assert reason(Attention).startswith("expected attention under a bias to equal")
        weights = module(tokens, bias, return_attn=True)
        assert_close(weights, reference.weights(module, tokens, bias=-bias))


def test_what_is_off_by_more_than_rounding_is_not_proved_and_by_how_much_is_said():
    class Attention(upstreams.ANOMALIB.cls("Attention")):
        def forward(self, x):
            return super().forward(x) + 8e-9

    module, tokens = plain(Attention), noise(1, 5, 12, seed=0)
    with dinov2_attn.install(module):
        assert "found a difference of 8e-09" in reason(Attention)
        assert_close(module(tokens, return_attn=True), reference.weights(module, tokens))


def test_a_projection_whose_bias_is_left_out_is_taken_at_the_kernel():
    class Attention(upstreams.ANOMALIB.cls("Attention")):
        def forward(self, x):
            B, N, C = x.shape
            qkv = F.linear(x, self.qkv.weight).reshape(B, N, 3, self.num_heads, -1)
            out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
            return self.proj(out.transpose(1, 2).reshape(B, N, C))

    module, tokens = plain(Attention, qkv_bias=True), noise(1, 5, 12, seed=0)
    with dinov2_attn.install(module):
        assert reason(Attention).startswith("expected proj(weights @ v) to equal")
        weights = module(tokens, return_attn=True)
        module.qkv.bias.data.zero_()
        assert_close(weights, reference.weights(module, tokens))


def test_a_class_that_takes_a_bias_of_four_dimensions_only_is_accepted():
    class Attention(upstreams.MOGE.cls("Attention")):
        def forward(self, x, attn_bias=None):
            if attn_bias is not None:
                B, N, _ = x.shape
                attn_bias = attn_bias.reshape(B, self.num_heads, N, N)
            return super().forward(x, attn_bias)

    module, tokens = Attention(12, num_heads=2), noise(1, 5, 12, seed=0)
    with dinov2_attn.install(module):
        assert dinov2_attn.status().at_kernel == {}
        assert module(tokens, return_attn=True).shape == (1, 2, 5, 5)


# A class that asks the flag, as upstream's does: its branch with xFormers is written here, the
# other one is that of the class below. Here the flag is down, and both are proved.
ASKING = """
class Attention(base):
    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.q_norm = Identity()
        {init}

    def forward(self, x, attn_bias=None):
        if not XFORMERS_AVAILABLE:
            return super().forward(x)
        q, k, v = unbind(self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1), 2)
        {change}
        x = memory_efficient_attention(q, k, v, attn_bias=attn_bias)
        return self.proj(x.flatten(2))
"""


def asking(init="pass", change="pass"):
    scope = {"__name__": __name__, "base": upstreams.DEPTH_ANYTHING.cls("Attention")}
    scope |= {"XFORMERS_AVAILABLE": False, "Identity": nn.Identity}
    exec(ASKING.format(init=init, change=change), scope)
    return scope["Attention"](12, num_heads=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("q = self.q_norm(q)", "also reads q_norm"),
        ("q = q * self.scale", "expected proj(weights @ v) to"),
        ("attn_bias = None", "expected attention under a bias to equal"),
    ],
)
def test_what_only_the_branch_with_xformers_does_is_not_proved(change, said):
    """The other branch runs here, and its weights are right all the same."""
    module, tokens = asking(change=change), noise(1, 5, 12, seed=0)
    with dinov2_attn.install(module):
        assert said in reason(type(module))
        assert_close(module(tokens, return_attn=True), reference.weights(module, tokens))


def test_a_scale_that_only_one_of_two_branches_uses_is_followed_there():
    module, tokens = asking(init="self.scale = 0.1"), noise(1, 5, 12, seed=0)
    with dinov2_attn.install(module):
        assert dinov2_attn.status().at_kernel == {}
        assert module(tokens, return_attn=True).shape == (1, 2, 5, 5)


def test_a_graft_that_returns_anything_else_is_refused():
    """The proof is of what users will get, not only of upstream's code."""
    cls = upstreams.ANOMALIB.cls("Attention")
    forward = vars(cls)["forward"]

    def wrong(module, x, *args, return_attn):
        return torch.full((3, 2, 7, 7), 1 / 7, dtype=x.dtype)

    with (
        sandbox(),
        pytest.raises(IncompatibleUpstreamError, match="Expected the weights returned to"),
    ):
        prove_attention(cls, forward, wrong, measure_kernel(cls, forward))


def test_attention_beside_a_vision_transformer_is_none_of_our_business():
    """A larger model may hold somebody else's, which would be refused on its own."""
    moge, other = upstreams.MOGE, upstreams.DEPTH_ANYTHING_3.cls("Block")(12, num_heads=2)
    model = moge.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1
    )
    before = dict(vars(type(other)))
    with dinov2_attn.install(nn.Sequential(model, other)):
        assert model.get_last_self_attention(noise(1, 3, 4, 4, seed=0)).shape == (1, 1, 5, 5)
        assert dict(vars(type(other))) == before


def test_the_right_formula_written_otherwise_is_accepted():
    """The counterpart: the check refuses what differs, not what is unfamiliar."""
    base = upstreams.ANOMALIB.cls("Attention")

    class Attention(base):
        def forward(self, x):
            return attend(self, x, lambda _, q, k, v: (q, k, v))

    module = Attention(12, num_heads=2)
    with dinov2_attn.install(module):
        assert module(noise(1, 5, 12, seed=0), return_attn=True).shape == (1, 2, 5, 5)


def test_overrides_that_hand_everything_on_are_accepted():
    class Attention(upstreams.ANOMALIB.cls("Attention")):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Block(upstreams.ANOMALIB.cls("Block")):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    block = Block(12, num_heads=2, attn_class=Attention)
    tokens = noise(1, 5, 12, seed=0)
    with dinov2_attn.install(block):
        weights = block(tokens, return_attention=True)
        assert_close(weights, block.attn(block.norm1(tokens), return_attn=True))


@pytest.mark.parametrize("attribute", ["q_norm", "rope", "temperature"])
def test_an_attribute_read_on_the_way_is_not_proved_even_when_it_does_nothing(attribute):
    base = upstreams.ANOMALIB.cls("Attention")

    class Attention(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            setattr(self, attribute, nn.Identity())

        def forward(self, x):
            return super().forward(getattr(self, attribute)(x))

    with dinov2_attn.install(Attention(12, num_heads=2)):
        assert re.search(rf"Attention to compute .* also reads {attribute}", reason(Attention))


def assert_right(model, reason_has):
    """Compare with what each attention is given in a plain pass, in the order of that pass."""
    attentions = [m for m in model.modules() if role_of_module(m) is Role.ATTENTION]
    images = noise(1, 3, 4, 4, seed=0)
    calls = inputs_of(attentions, lambda: model.forward_features(images))
    expected = [reference.weights(module, *args) for module, (args, _) in calls]
    with dinov2_attn.install(model):
        assert re.search(reason_has, reason(type(model)))
        for _ in range(2):
            assert_all_close(model.get_self_attention(images), expected)
        assert_all_close(model(images, return_attention=True)[1], expected)


def small(cls, **options):
    return cls(img_size=4, patch_size=2, embed_dim=4, num_heads=1, **options)


def test_a_model_whose_pass_is_another_runs_its_own():
    """Registers appended behind the patches; blocks in another order."""
    base = upstreams.MOGE.cls("DinoVisionTransformer")

    class Trailing(base):
        def prepare_tokens_with_masks(self, x, masks=None):
            tokens = super().prepare_tokens_with_masks(x, masks)
            return torch.cat([tokens, tokens[:, :1]], dim=1)

    class Reversed(base):
        def forward_features(self, x, masks=None):
            x = self.prepare_tokens_with_masks(x, masks)
            for block in list(self.modules())[::-1]:
                x = block(x) if role_of_module(block) is Role.BLOCK else x
            return {"x_norm_clstoken": x[:, 0]}

        def forward(self, x):
            return self.forward_features(x)["x_norm_clstoken"]

    assert_right(small(Trailing, depth=2), "found 11 tokens")
    assert_right(small(Reversed, depth=2), "expected the attention of a model to equal")


@pytest.mark.parametrize("other_when_chunked", [True, False])
def test_a_copy_whose_pass_is_another_only_when_chunked_or_flat(other_when_chunked):
    base = upstreams.MOGE.cls("DinoVisionTransformer")

    class Model(base):
        def forward_features(self, x, masks=None):
            if self.chunked_blocks != other_when_chunked:
                return super().forward_features(x, masks)
            x = self.prepare_tokens_with_masks(x, masks)
            for chunk in list(self.blocks)[::-1]:
                x = chunk(x)
            return {"x_norm_clstoken": x[:, 0]}

    assert_right(small(Model, depth=2, block_chunks=0), "attention of a model")


def test_an_attention_that_a_pass_does_not_call_is_left_alone():
    """It stands beside those of the blocks."""
    upstream = upstreams.MOGE

    class Model(upstream.cls("DinoVisionTransformer")):
        def __init__(self, *, embed_dim, **options):
            super().__init__(embed_dim=embed_dim, **options)
            self.spare = upstream.cls("Attention")(embed_dim, num_heads=1)

        def forward(self, x):
            return super().forward(x)

    assert_right(small(Model, depth=2), r"zip\(\) argument 2 is shorter")


def test_a_block_with_a_second_attention_says_so_when_asked():
    """``get_self_attention`` would answer for one of them only."""
    moge = upstreams.MOGE

    class Block(moge.cls("NestedTensorBlock")):
        def forward(self, x):
            return x + self.attn(self.norm1(x)) + self.second(x)

    model = small(moge.cls("DinoVisionTransformer"), depth=2, block_chunks=0)
    images = noise(1, 3, 4, 4, seed=0)
    for block in model.blocks:
        block.__class__, block.second = Block, moge.cls("Attention")(4, num_heads=1)
    with dinov2_attn.install(model):
        for _ in range(2):
            with pytest.raises(NotGraftedError, match=r"of 2 blocks.*\nFound that of 4"):
                model.get_self_attention(images)
        with pytest.raises(NotRecordedError, match="Found 2 calls"):
            model.blocks[0](noise(1, 5, 4, seed=0), return_attention=True)
        with dinov2_attn.record(model) as maps:
            model(images)
        assert [len(one.weights) for one in maps.passes] == [2, 2]


def test_blocks_that_drop_tokens(monkeypatch):
    """Behind the first of them rows and columns are fewer."""
    block = upstreams.MOGE.cls("Block")
    upstream = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x: upstream(self, x)[:, :-1])
    assert_right(
        small(upstreams.MOGE.cls("DinoVisionTransformer"), depth=2), "patches; found 9 tokens"
    )


VARIANTS = {
    "no scale": lambda m: setattr(m, "scale", None),
    "a scale for each head": lambda m: setattr(m, "scale", torch.ones(2, 1, 1)),
    "a wider projection": lambda m: setattr(m, "qkv", nn.Linear(10, 40)),
}


def test_a_module_need_not_be_built_as_upstreams_is():
    """A projection in two steps, wrapped by an adapter: only what it computes counts."""

    class Attention(upstreams.ANOMALIB.cls("Attention")):
        def __init__(self, dim, num_heads=8):
            super().__init__(dim, num_heads)
            self.proj = nn.Sequential(nn.Linear(dim, 3), nn.Linear(3, dim))

        def forward(self, x):
            return super().forward(x)

    module, tokens = Attention(10, num_heads=2), noise(1, 5, 10, seed=0)
    with dinov2_attn.install(module):
        assert module(tokens, return_attn=True).shape == (1, 2, 5, 5)


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_whatever_foreign_code_raises_in_a_proof_is_only_a_reason(change):
    class Attention(upstreams.DEPTH_ANYTHING.cls("Attention")):
        def __init__(self, dim, num_heads=8, **options):
            super().__init__(dim, num_heads, **options)
            change(self)

        def forward(self, x):
            return super().forward(x)

    module, tokens = Attention(10, num_heads=2), noise(1, 5, 10, seed=0)
    with dinov2_attn.install(module):
        assert re.match("expected .*; found ", reason(Attention))
        try:
            module(tokens)
        except Exception as error:
            with pytest.raises(type(error)):
                module(tokens, return_attn=True)
        else:
            assert module(tokens, return_attn=True).shape == (1, 2, 5, 5)


def test_an_attention_of_the_users_own_inside_upstreams_block():
    class Flash(nn.Module):
        def __init__(self, dim, num_heads, qkv_bias=False, **_):
            super().__init__()
            self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
            self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

        def forward(self, x):
            return attend(self, x, lambda _, q, k, v: (q, k, v))

    block = upstreams.FIRST.cls("Block")
    model = upstreams.FIRST.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=4, depth=2, num_heads=1, block_chunks=0,
        block_fn=lambda **options: block(**options, attn_class=Flash),
    )  # fmt: skip
    with dinov2_attn.install(model):
        assert dinov2_attn.status().at_kernel == {}  # blocks are proved with it inside
        assert len(model.get_self_attention(noise(1, 3, 4, 4, seed=0))) == 2


def test_a_wrapper_that_reads_from_the_model_inside_is_no_model():
    class Delegating(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    model = upstreams.MOGE.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1
    )
    wrapper = Delegating(model)
    with dinov2_attn.install(wrapper):
        assert wrapper.get_last_self_attention(noise(1, 3, 4, 4, seed=0)).shape[-1] == 5


def test_a_model_of_the_users_own_that_takes_images_only():
    class Classifier(upstreams.MOGE.cls("DinoVisionTransformer")):
        def forward(self, x):
            return super().forward(x).mean()

    model = Classifier(img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1)
    with dinov2_attn.install(model):
        output, attentions = model(noise(1, 3, 4, 4, seed=0), return_attention=True)
        assert output.ndim == 0
        assert len(attentions) == 1


def test_a_class_that_cannot_be_built_small_is_taken_at_its_kernel():
    base = upstreams.ANOMALIB.cls("Attention")

    class Attention(base):
        def __init__(self, config):
            super().__init__(**config)

        def forward(self, x):
            return super().forward(x)

    module, tokens = Attention({"dim": 12, "num_heads": 2}), noise(1, 5, 12, seed=0)
    with dinov2_attn.install(module):
        assert re.search("built and run small.*TypeError", reason(Attention))
        assert_close(module(tokens, return_attn=True), reference.weights(module, tokens))


def test_a_model_without_attention_is_refused():
    with pytest.raises(IncompatibleUpstreamError, match="(?s)none in torch.nn.*Linear"):
        dinov2_attn.install(nn.Linear(2, 2))


@pytest.mark.parametrize("target", [3, "", b"dinov2", object(), nn.Linear, torch])
def test_what_is_neither_package_nor_model_is_refused(target):
    with pytest.raises(InvalidInputError, match="name of a package or a live model"):
        dinov2_attn.install(target)


def test_upstream_with_its_classes_gone_is_refused():
    """Drift: a module where upstream keeps its attention, without any."""
    modules = {"dinov2": types.ModuleType("dinov2")}
    modules |= {n: types.ModuleType(n) for n in ("dinov2.layers", "dinov2.layers.attention")}
    saved = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "dinov2"}
    for name in saved:
        del sys.modules[name]
    sys.modules.update(modules)
    try:
        with pytest.raises(IncompatibleUpstreamError, match="moved or renamed"):
            dinov2_attn.install()
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(saved)


def test_the_branch_with_xformers_is_proved_without_xformers():
    """Its code runs over a plain kernel; a wrong one there is caught as well."""
    cls = upstreams.FIRST.cls("MemEffAttention")
    module = cls(12, num_heads=2).double()
    tokens = noise(2, 5, 12, seed=0, dtype=torch.float64)
    runs = branches(vars(cls)["forward"])
    assert runs[True] is not runs[False]
    assert_close(runs[True](module, tokens), runs[False](module, tokens))

    source_globals = runs[True].__globals__
    assert source_globals["XFORMERS_AVAILABLE"]
    assert source_globals is not vars(cls)["forward"].__globals__


@pytest.mark.parametrize("default", [torch.float64, torch.float32])
def test_the_check_does_not_depend_on_the_users_defaults(default):
    """Defaults, grad mode and autocast of the importing program stay out of it."""
    torch.set_default_dtype(default)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            dinov2_attn.install(upstreams.MOGE.package).uninstall()
        with torch.device("meta"):
            dinov2_attn.install(upstreams.MOGE.package).uninstall()
    finally:
        torch.set_default_dtype(torch.float32)
