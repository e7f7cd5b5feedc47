"""The proof at install: what is not plain attention is refused, with nothing grafted."""

from __future__ import annotations

import functools
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dinov2_attn
from dinov2_attn.backbone.proof import measure_kernel, prove_attention, sandbox
from dinov2_attn.backbone.structure import Role, classes_in, role_of_module
from dinov2_attn.errors import IncompatibleUpstreamError, InvalidInputError
from dinov2_attn.kernels.branches import branches
from tests.support import upstreams
from tests.support.strategies import noise
from tests.support.tolerances import assert_close


@pytest.fixture(autouse=True)
def _clean():
    yield
    dinov2_attn.uninstall()


def all_forwards(*modules):
    return {(c, k): v for m in modules for c, _ in classes_in(m) for k, v in vars(c).items()}


def test_depth_anything_3_is_refused_and_left_alone():
    """Real code with a q/k norm and RoPE between projection and kernel."""
    fork = upstreams.DEPTH_ANYTHING_3
    attention = fork.module(fork.attention)
    before = all_forwards(attention)
    with pytest.raises(IncompatibleUpstreamError) as caught:
        dinov2_attn.install(fork.package)
    assert "pos" in str(caught.value)
    assert all_forwards(attention) == before
    assert dinov2_attn.status().grafted == ()
    assert dinov2_attn.status().recognised == {}
    assert not any("dinov2_attn" in type(f).__module__ for f in sys.meta_path)


def test_depth_anything_3_is_refused_when_imported_later():
    fork = upstreams.DEPTH_ANYTHING_3
    for name in [m for m in sys.modules if m.startswith(fork.package + ".")]:
        del sys.modules[name]
    dinov2_attn.install(fork.package)
    for _ in range(2):  # the second import must not succeed with nothing said
        with pytest.raises(IncompatibleUpstreamError):
            fork.module(fork.attention)
    assert dinov2_attn.status().grafted == ()
    assert "IncompatibleUpstreamError" not in dinov2_attn.status().grafted
    assert dinov2_attn.status().recognised[fork.package].startswith("refused: expected")


def test_depth_anything_3_is_refused_as_a_live_model():
    fork = upstreams.DEPTH_ANYTHING_3
    block = fork.cls("Block")(12, num_heads=2)
    with pytest.raises(IncompatibleUpstreamError, match=r"(?s)Expected .*\nFound .*"):
        dinov2_attn.install(block)


# Each variant changes one thing between projection and kernel, without a new argument or a new
# attribute: only behaviour can tell. The base is upstream's own class.


def _kernel(self, x, change):
    B, N, C = x.shape
    qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
    q, k, v = change(self, *qkv.unbind(0))
    out = F.scaled_dot_product_attention(q, k, v)
    return self.proj(out.transpose(1, 2).reshape(B, N, C))


CHANGES = {
    "queries and keys normalised": lambda _, q, k, v: (
        F.normalize(q, dim=-1),
        F.normalize(k, dim=-1),
        v,
    ),
    "queries shifted by one token": lambda _, q, k, v: (q.roll(1, 2), k, v),
    "queries rotated": lambda _, q, k, v: (q.flip(-1), k, v),
    "keys before queries": lambda _, q, k, v: (k, q, v),
    "heads in another order": lambda _, q, k, v: (q.flip(1), k.flip(1), v),
    "scaled twice": lambda s, q, k, v: (q * s.scale, k, v),
    "values before keys": lambda _, q, k, v: (q, v, k),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_other_formula_is_refused(change):
    base = upstreams.ANOMALIB.cls("Attention")

    class Attention(base):
        def forward(self, x):
            return _kernel(self, x, change)

    with pytest.raises(
        IncompatibleUpstreamError,
        match=r"(?s)Expected proj\(weights @ v\) to equal .*nothing was",
    ):
        dinov2_attn.install(Attention(12, num_heads=2))
    assert "return_attn" not in str(Attention.forward)
    assert dinov2_attn.status().grafted == ()


def test_another_meaning_of_causal_is_refused():
    base = upstreams.ANOMALIB.cls("Attention")

    class Attention(base):
        def forward(self, x, is_causal=False):
            if not is_causal:
                return super().forward(x)
            return super().forward(x.flip(1), True).flip(1)  # the past hidden, not the future

    with pytest.raises(IncompatibleUpstreamError, match="causal attention to equal"):
        dinov2_attn.install(Attention(12, num_heads=2))


def test_another_meaning_of_the_bias_is_refused():
    base = upstreams.MOGE.cls("Attention")

    class Attention(base):
        def forward(self, x, attn_bias=None):
            return super().forward(x, None if attn_bias is None else -attn_bias)

    with pytest.raises(IncompatibleUpstreamError, match="under a bias to equal"):
        dinov2_attn.install(Attention(12, num_heads=2))


def test_what_is_off_by_more_than_rounding_is_refused_and_by_how_much_is_said():
    class Attention(upstreams.ANOMALIB.cls("Attention")):
        def forward(self, x):
            return super().forward(x) + 8e-9

    with pytest.raises(IncompatibleUpstreamError, match="Found a difference of 8e-09"):
        dinov2_attn.install(Attention(12, num_heads=2))


def test_a_projection_whose_bias_is_left_out_is_refused():
    class Attention(upstreams.ANOMALIB.cls("Attention")):
        def forward(self, x):
            B, N, C = x.shape
            qkv = F.linear(x, self.qkv.weight).reshape(B, N, 3, self.num_heads, -1)
            out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
            return self.proj(out.transpose(1, 2).reshape(B, N, C))

    with pytest.raises(IncompatibleUpstreamError, match="proj.weights @ v"):
        dinov2_attn.install(Attention(12, num_heads=2))


def test_a_class_that_takes_a_bias_of_four_dimensions_only_is_accepted():
    class Attention(upstreams.MOGE.cls("Attention")):
        def forward(self, x, attn_bias=None):
            if attn_bias is not None:
                B, N, _ = x.shape
                attn_bias = attn_bias.reshape(B, self.num_heads, N, N)
            return super().forward(x, attn_bias)

    module, tokens = Attention(12, num_heads=2), noise(1, 5, 12, seed=0)
    with dinov2_attn.install(module):
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
        ("q = q * self.scale", "proj.weights @ v"),
        ("attn_bias = None", "under a bias to equal"),
    ],
)
def test_what_only_the_branch_with_xformers_does_is_refused(change, said):
    with pytest.raises(IncompatibleUpstreamError, match=said):
        dinov2_attn.install(asking(change=change))


def test_a_scale_that_only_one_of_two_branches_uses_is_followed_there():
    module, tokens = asking(init="self.scale = 0.1"), noise(1, 5, 12, seed=0)
    with dinov2_attn.install(module):
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
            return _kernel(self, x, lambda _, q, k, v: (q, k, v))

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
def test_an_attribute_read_on_the_way_is_refused_even_when_it_does_nothing(attribute):
    base = upstreams.ANOMALIB.cls("Attention")

    class Attention(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            setattr(self, attribute, nn.Identity())

        def forward(self, x):
            return super().forward(getattr(self, attribute)(x))

    said = rf"(?s){__name__}.*Attention to compute .* also reads {attribute}"
    with pytest.raises(IncompatibleUpstreamError, match=said):
        dinov2_attn.install(Attention(12, num_heads=2))


def test_a_copy_patched_by_hand_is_refused():
    base = upstreams.ANOMALIB.cls("Attention")

    class Attention(base):
        def forward(self, x, return_attn=False):
            return x if return_attn else super().forward(x)

    with pytest.raises(IncompatibleUpstreamError, match="patched by hand"):
        dinov2_attn.install(Attention(12, num_heads=2))

    class Model(upstreams.MOGE.cls("DinoVisionTransformer")):
        def get_last_self_attention(self, x):
            return x

        get_last_selfattention = get_last_self_attention

        def forward(self, x):
            return super().forward(x)

    model = Model(img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1)
    taken = "Found get_last_self_attention, get_last_selfattention already there"
    with pytest.raises(IncompatibleUpstreamError, match=taken):
        dinov2_attn.install(model)
    assert dinov2_attn.status().grafted == ()


def _other_blocks():
    base = upstreams.ANOMALIB.cls("Block")

    class NormTwice(base):
        def forward(self, x):
            return x + self.attn(self.norm1(self.norm1(x)))

    class AttendTwice(base):
        def forward(self, x):
            return x + self.attn(self.norm1(x)) + self.attn(self.norm1(x))

    class NeverAttend(base):
        def forward(self, x):
            return x + self.mlp(self.norm2(x))

    return [NormTwice, AttendTwice, NeverAttend]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_block_that_attends_to_something_else_is_refused(which):
    block = _other_blocks()[which](12, num_heads=2)
    for parameter in block.norm1.parameters():
        nn.init.normal_(parameter)
    said = "Expected the attention of a block to equal" if which == 0 else "call its attention 1"
    with pytest.raises(IncompatibleUpstreamError, match=said):
        dinov2_attn.install(block)


def test_a_model_whose_pass_is_another_is_refused():
    """Registers appended behind the patches; every second block skipped."""
    base = upstreams.MOGE.cls("DinoVisionTransformer")

    class Trailing(base):
        def prepare_tokens_with_masks(self, x, masks=None):
            tokens = super().prepare_tokens_with_masks(x, masks)
            return torch.cat([tokens, tokens[:, :1]], dim=1)

    class Skipping(base):
        def forward_features(self, x, masks=None):
            x = self.prepare_tokens_with_masks(x, masks)
            for block in list(self.modules())[::-1]:
                x = block(x) if role_of_module(block) is Role.BLOCK else x
            return {"x_norm_clstoken": x[:, 0]}

    for cls in (Trailing, Skipping):
        model = cls(img_size=4, patch_size=2, embed_dim=4, depth=2, num_heads=1)
        said = "Found 11 tokens|Expected the attention of a model to equal"
        with pytest.raises(IncompatibleUpstreamError, match=said):
            dinov2_attn.install(model)
        assert not hasattr(model, "get_self_attention")


@pytest.mark.parametrize("wrong_when_chunked", [True, False])
def test_a_copy_that_is_wrong_only_when_chunked_or_flat_is_refused(wrong_when_chunked):
    base = upstreams.MOGE.cls("DinoVisionTransformer")

    class Model(base):
        def forward_features(self, x, masks=None):
            if self.chunked_blocks != wrong_when_chunked:
                return super().forward_features(x, masks)
            x = self.prepare_tokens_with_masks(x, masks)
            for chunk in list(self.blocks)[::-1]:
                x = chunk(x)
            return {"x_norm_clstoken": x[:, 0]}

    model = Model(img_size=4, patch_size=2, embed_dim=4, depth=2, num_heads=1, block_chunks=0)
    with pytest.raises(IncompatibleUpstreamError, match="attention of a model"):
        dinov2_attn.install(model)


def small(cls, **options):
    return cls(img_size=4, patch_size=2, embed_dim=4, num_heads=1, **options)


def test_an_attention_that_a_pass_does_not_call_is_refused():
    """Beside those of the blocks: which weights are whose cannot be told."""
    upstream = upstreams.MOGE

    class Model(upstream.cls("DinoVisionTransformer")):
        def __init__(self, *, embed_dim, **options):
            super().__init__(embed_dim=embed_dim, **options)
            self.spare = upstream.cls("Attention")(embed_dim, num_heads=1)

        def forward(self, x):
            return super().forward(x)

    with pytest.raises(IncompatibleUpstreamError, match=r"zip\(\) argument 2 is shorter"):
        dinov2_attn.install(small(Model, depth=2))


def test_a_block_with_a_second_attention_is_refused(monkeypatch):
    """``get_self_attention`` would answer for one of them only."""
    moge = upstreams.MOGE
    attention, block, model = map(moge.cls, ("Attention", "Block", "DinoVisionTransformer"))
    init, init_model = block.__init__, model.__init__

    @functools.wraps(init)
    def with_a_second(self, dim, num_heads, **options):
        init(self, dim, num_heads, **options)
        self.second = attention(dim, num_heads)

    @functools.wraps(init_model)
    def of_half_the_depth(self, *, depth, **options):
        init_model(self, depth=depth // 2, **options)

    monkeypatch.setattr(block, "__init__", with_a_second)
    monkeypatch.setattr(
        block, "forward", lambda self, x: x + self.attn(self.norm1(x)) + self.second(x)
    )
    monkeypatch.setattr(model, "__init__", of_half_the_depth)
    with pytest.raises(IncompatibleUpstreamError, match=r"zip\(\) argument 2 is longer"):
        dinov2_attn.install(small(model, depth=2))


def test_blocks_that_drop_tokens_are_refused(monkeypatch):
    """Behind the first of them rows and columns are others than they are taken for."""
    block = upstreams.MOGE.cls("Block")
    upstream = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x: upstream(self, x)[:, :-1])
    with pytest.raises(IncompatibleUpstreamError, match="patches.\nFound 9 tokens"):
        dinov2_attn.install(small(upstreams.MOGE.cls("DinoVisionTransformer"), depth=2))


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
def test_whatever_foreign_code_raises_is_told_as_incompatible(change):
    class Attention(upstreams.DEPTH_ANYTHING.cls("Attention")):
        def __init__(self, dim, num_heads=8, **options):
            super().__init__(dim, num_heads, **options)
            change(self)

        def forward(self, x):
            return super().forward(x)

    with pytest.raises(IncompatibleUpstreamError, match="(?s)Expected .*.\nFound "):
        dinov2_attn.install(Attention(10, num_heads=2))
    assert dinov2_attn.status().grafted == ()


def test_an_attention_of_the_users_own_inside_upstreams_block():
    class Flash(nn.Module):
        def __init__(self, dim, num_heads, qkv_bias=False, **_):
            super().__init__()
            self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
            self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

        def forward(self, x):
            return _kernel(self, x, lambda _, q, k, v: (q, k, v))

    block = upstreams.FIRST.cls("Block")
    model = upstreams.FIRST.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=4, depth=2, num_heads=1, block_chunks=0,
        block_fn=lambda **options: block(**options, attn_class=Flash),
    )  # fmt: skip
    with dinov2_attn.install(model):
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


def test_a_class_that_cannot_be_built_small_is_refused():
    base = upstreams.ANOMALIB.cls("Attention")

    class Attention(base):
        def __init__(self, config):
            super().__init__(**config)

        def forward(self, x):
            return super().forward(x)

    with pytest.raises(IncompatibleUpstreamError, match="(?s)built and run small.*TypeError"):
        dinov2_attn.install(Attention({"dim": 12, "num_heads": 2}))


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
