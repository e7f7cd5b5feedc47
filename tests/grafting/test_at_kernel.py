"""What ``install`` accepts though its formula is another: weights come from the kernel's call."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dinov2_attn
from dinov2_attn.errors import IncompatibleUpstreamError, InvalidInputError, NotRecordedError
from tests.support import reference, upstreams
from tests.support.compiling import compiles
from tests.support.other_attention import (
    CHANGES,
    attend,
    changed_truth,
    expected_weights,
    model_with,
    parts_are_right,
    right_in_every_way,
    softmax_of,
    split,
    tensors_of,
)
from tests.support.recordings import IMAGES, assert_all_close
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close, assert_same_bits

MOGE = upstreams.MOGE


@pytest.fixture(autouse=True)
def _clean():
    dinov2_attn.uninstall()
    yield
    dinov2_attn.uninstall()


def name(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_other_formula_is_taken_at_its_kernel(change):
    class Attention(MOGE.cls("Attention")):
        def forward(self, x, attn_bias=None):
            return attend(self, x, change)

    model, truth = model_with(Attention), changed_truth(change)
    with right_in_every_way(model, truth) as status:
        parts_are_right(model, truth)
    assert status.at_kernel[name(Attention)].startswith("expected proj(weights @ v) to equal what")
    assert f"weights at the kernel: {name(Attention)}: expected" in str(status)
    assert status.left_out == {}


def test_the_reason_says_what_is_read_on_the_way():
    """A norm that does nothing here may do something elsewhere: no proof holds for it."""

    class Attention(MOGE.cls("Attention")):
        def forward(self, x, attn_bias=None):
            return super().forward(getattr(self, "q_norm", nn.Identity())(x))

    class WithNorm(Attention):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.q_norm = nn.Identity()

        def forward(self, x, attn_bias=None):
            return super().forward(self.q_norm(x))

    model = model_with(WithNorm)
    for block in model.blocks:
        block.attn.q_norm = nn.Identity()
    with right_in_every_way(model, reference.weights) as status:
        parts_are_right(model, reference.weights)
    assert "also reads q_norm" in status.at_kernel[name(WithNorm)]


def test_depth_anything_3_is_taken_at_its_kernel():
    """Real code with norms and a rotation between projection and kernel."""
    fork = upstreams.DEPTH_ANYTHING_3

    class Turned(nn.Module):
        def forward(self, tokens, pos):
            return tokens * pos[:, None].cos() + tokens.roll(1, -1) * pos[:, None].sin()

    block = fork.cls("Block")(12, num_heads=2, qk_norm=True, rope=Turned())
    block = randomise(block.double(), 1)
    tokens, pos = (noise(2, n, d, seed=n, dtype=torch.float64) for n, d in ((5, 12), (5, 1)))
    plain = block(tokens, pos=pos)
    q, k, _ = split(block.attn, block.norm1(tokens))
    q, k = (block.attn.rope(n(t), pos) for n, t in ((block.attn.q_norm, q), (block.attn.k_norm, k)))
    expected = softmax_of(q, k)
    for target in (fork.package, block):
        with dinov2_attn.install(target):
            reasons = dinov2_attn.status().at_kernel
            assert "found the argument pos, attn_mask" in reasons[name(fork.cls("Attention"))]
            for _ in range(2):
                assert_close(block(tokens, pos=pos, return_attention=True), expected)
            normed = block.norm1(tokens)
            assert_close(
                block.attn(normed, pos=pos, return_attn=True, queries=1), expected[:, :, 1:2]
            )
            assert_same_bits(block(tokens, pos=pos), plain)
    assert dinov2_attn.status().at_kernel == {}


# A fork's own keywords and methods. Each returns something else than weights, to be told apart.


class _Own:
    """Classes with a keyword of their own that returns a marked tensor."""

    @staticmethod
    def attention():
        class Attention(MOGE.cls("Attention")):
            def forward(self, x, attn_bias=None, return_attn=False):
                out = super().forward(x)
                return (out, out + 1) if return_attn else out

        return Attention

    @staticmethod
    def block():
        class Block(MOGE.cls("NestedTensorBlock")):
            def forward(self, x_or_x_list, return_attention=False):
                return "theirs" if return_attention else super().forward(x_or_x_list)

        return Block

    @staticmethod
    def model():
        class Model(MOGE.cls("DinoVisionTransformer")):
            def get_last_selfattention(self, x):
                return "theirs"

            def forward(self, x, return_attention=False):
                return "theirs" if return_attention else super().forward(x)

        return Model


OWN = {
    "in attention only": ("attention",),
    "in block only": ("block",),
    "in the model only": ("model",),
    "in all three": ("attention", "block", "model"),
}


@pytest.mark.parametrize("where", OWN.values(), ids=OWN)
def test_a_forks_own_answers_stay_and_ours_have_the_free_names(where):
    classes = {part: getattr(_Own, part)() for part in where}
    model = model_with(**classes)
    expected = expected_weights(model, reference.weights)
    plain = tensors_of(model.forward_features(IMAGES))
    theirs = classes.get("model") and vars(classes["model"])["get_last_selfattention"]
    tokens = model.prepare_tokens_with_masks(IMAGES)
    normed = model.blocks[0].norm1(tokens)
    own = model.blocks[0].attn(normed, return_attn=True) if "attention" in where else None
    with dinov2_attn.install(model):
        reasons = dinov2_attn.status().at_kernel
        assert {name(cls) for cls in classes.values()} <= reasons.keys()
        for _ in range(2):
            assert_all_close(model.get_self_attention(IMAGES), expected)
            assert_close(model.get_last_self_attention(IMAGES), expected[-1])
        both = model.forward_features(IMAGES, return_attention=True)
        assert_all_close(both.pop("attentions"), expected)
        assert_same_bits(tensors_of(both), plain)
        if "attention" in where:
            assert_same_bits(model.blocks[0].attn(normed, return_attn=True), own)
        else:
            assert_close(model.blocks[0].attn(normed, return_attn=True), expected[0])
        asked = model.blocks[0](tokens, return_attention=True)
        if "block" in where:
            assert asked == "theirs"
        else:
            assert_close(asked, expected[0])
        if "model" in where:
            assert model.get_last_selfattention(IMAGES) == "theirs"
            assert vars(type(model))["get_last_selfattention"] is theirs
            assert model(IMAGES, return_attention=True) == "theirs"
        else:
            assert_close(model.get_last_selfattention(IMAGES), expected[-1])
            assert_all_close(model(IMAGES, return_attention=True)[1], expected)


def test_an_attention_that_returns_its_weights_beside_the_features():
    class Attention(MOGE.cls("Attention")):
        def forward(self, x, attn_bias=None):
            q, k, v = split(self, x)
            attn = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
            return self.proj((attn @ v).transpose(1, 2).reshape(x.shape)), attn

    class Block(MOGE.cls("NestedTensorBlock")):
        def forward(self, x):
            x = x + self.ls1(self.attn(self.norm1(x))[0])
            return x + self.ls2(self.mlp(self.norm2(x)))

    model = model_with(Attention, Block)
    with right_in_every_way(model, reference.weights):
        parts_are_right(model, reference.weights)


@pytest.mark.parametrize("formula", ["upstream's", "another"])
def test_an_attention_without_a_scale(formula):
    class Attention(nn.Module):
        def __init__(self, dim, num_heads=8, qkv_bias=False):
            super().__init__()
            self.num_heads = num_heads
            self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

        def forward(self, x):
            return attend(self, x, change)

    change = (lambda _, q, k, v: (q, k, v)) if formula == "upstream's" else CHANGES["scaled twice"]
    if formula == "another":
        change = CHANGES["keys before queries"]
    model = model_with()
    for block in model.blocks:
        block.attn = randomise(Attention(8, 2).double(), 3)
    with right_in_every_way(model, changed_truth(change)) as status:
        parts_are_right(model, changed_truth(change))
    assert (name(Attention) in status.at_kernel) == (formula == "another")


class Tuned(nn.Module):
    """Attention with flags and arguments that are off in the instance at hand."""

    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_norm=False, tuning_mode=None):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.tuning_mode = tuning_mode
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()

    def forward(self, x, rope=None, mask=None):
        q, k, v = split(self, x)
        q, k = self.q_norm(q), self.q_norm(k)
        if self.tuning_mode == "ssf":
            q = q * 2
        if rope is not None:
            q, k = q * rope, k * rope
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("mode", [None, "ssf"])
def test_flags_and_arguments_that_are_off_and_on(mode):
    model = model_with()
    for block in model.blocks:
        block.attn = randomise(Tuned(8, 2, tuning_mode=mode).double(), 3)

    def truth(module, x):
        q, k, _ = split(module, x)
        return softmax_of(q * (2 if mode else 1), k)

    with right_in_every_way(model, truth) as status:
        parts_are_right(model, truth)
    assert "found the argument rope, mask" in status.at_kernel[name(Tuned)]


def test_blocks_that_the_model_gives_further_arguments():
    """They are not known from outside, so the model runs its own pass."""

    class Block(MOGE.cls("NestedTensorBlock")):
        def forward(self, x, rope, mask=None):
            x = x + self.ls1(self.attn(self.norm1(x), rope=rope, mask=mask))
            return x + self.ls2(self.mlp(self.norm2(x)))

    class Model(MOGE.cls("DinoVisionTransformer")):
        def forward_features(self, x, masks=None):
            x = self.prepare_tokens_with_masks(x, masks)
            rope = torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype)[:, None]
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(2)
            for block in self.blocks:
                x = block(x, rope, mask=mask)
            return {"x_norm_clstoken": self.norm(x)[:, 0], "x_prenorm": x}

        def forward(self, x):
            return self.forward_features(x)["x_norm_clstoken"]

    def truth(module, x, rope, mask):
        q, k, _ = split(module, x)
        scores = (q * rope) @ (k * rope).mT * module.scale
        return scores.masked_fill(~mask, -torch.inf).softmax(-1)

    model = model_with(block=Block, model=Model)
    for block in model.blocks:
        block.attn = randomise(Tuned(8, 2).double(), 3)
    with right_in_every_way(model, truth):
        parts_are_right(model, truth)


def test_features_that_are_no_dict():
    """The error names the calls that answer."""

    class Model(MOGE.cls("DinoVisionTransformer")):
        def forward_features(self, x, masks=None):
            return list(super().forward_features(x, masks).values())

        def forward(self, x):
            return self.forward_features(x)[0]

    model = model_with(model=Model)
    expected = expected_weights(model, reference.weights)
    with dinov2_attn.install(model):
        said = r"(?s)dict.*Found list.*model\(x, return_attention=True\).*get_self_attention\(x\)"
        with pytest.raises(IncompatibleUpstreamError, match=said):
            model.forward_features(IMAGES, return_attention=True)
        assert_all_close(model.get_self_attention(IMAGES), expected)
        output, attentions = model(IMAGES, return_attention=True)
        assert_all_close(attentions, expected)
        assert_same_bits(output, model(IMAGES))


def test_a_model_whose_forward_takes_more_than_images():
    """Its features are all that runs for the weights."""

    class Attention(MOGE.cls("Attention")):
        def forward(self, x, attn_bias=None):
            return attend(self, x, CHANGES["scaled twice"])

    class Model(MOGE.cls("DinoVisionTransformer")):
        def forward(self, x, labels):
            return labels + self.forward_features(x)["x_norm_clstoken"] * 2

    model = model_with(Attention, model=Model)
    expected = expected_weights(model, changed_truth(CHANGES["scaled twice"]))
    with dinov2_attn.install(model):
        for _ in range(2):
            assert_all_close(model.get_self_attention(IMAGES), expected)


def test_a_model_without_features_runs_its_forward():
    class Bare(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.patch_embed, self.blocks = model.patch_embed, model.blocks
            self.patch_size, self.num_register_tokens = 2, 0
            self.tokens = [model.prepare_tokens_with_masks]

        def prepare_tokens_with_masks(self, x, masks=None):
            return self.tokens[0](x, masks)

        def forward(self, x):
            x = self.prepare_tokens_with_masks(x)
            for block in self.blocks:
                x = block(x)
            return x

    class Attention(MOGE.cls("Attention")):
        def forward(self, x, attn_bias=None):
            return attend(self, x, CHANGES["scaled twice"])

    model = model_with(Attention)
    expected = expected_weights(model, changed_truth(CHANGES["scaled twice"]))
    bare = Bare(model)
    with dinov2_attn.install(bare):
        for _ in range(2):
            assert_all_close(bare.get_self_attention(IMAGES), expected)
        assert_all_close(bare(IMAGES, return_attention=True)[1], expected)


def test_an_override_of_any_arguments_takes_its_tokens_first():
    class Attention(MOGE.cls("Attention")):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = model_with(Attention)
    with right_in_every_way(model, reference.weights) as status:
        parts_are_right(model, reference.weights)
    assert name(Attention) not in status.at_kernel


def test_a_block_answers_a_list_tensor_by_tensor():
    """Other lists of its length are one value for each, and all else is the same for all."""

    class Block(MOGE.cls("NestedTensorBlock")):
        def forward(self, x, rope, factor=1):
            return x + self.ls1(self.attn(self.norm1(x) * factor, rope=rope))

    model = model_with(block=Block)
    block = model.blocks[0]
    block.attn = randomise(Tuned(8, 2).double(), 3)
    tokens = [model.prepare_tokens_with_masks(x) for x in (IMAGES, IMAGES[:1, ..., :2])]
    ropes = [torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype)[:, None] for x in tokens]
    with dinov2_attn.install(model):
        expected = [
            block(x, rope, factor=2, return_attention=True)
            for x, rope in zip(tokens, ropes, strict=True)
        ]
        found = block(tokens, ropes, factor=2, return_attention=True)
        assert_all_close(found, expected)
        found = block(tokens, rope=ropes, factor=2, return_attention=True, queries=0, heads="mean")
        assert_all_close(found, [weights[:, :, :1].mean(1) for weights in expected])
        with pytest.raises(InvalidInputError, match="heads"):
            block(tokens, ropes, return_attention=True, heads="max")


def test_an_attention_at_its_kernel_runs_once_and_names_what_it_does_not_take():
    class Attention(MOGE.cls("Attention")):
        def forward(self, x, attn_bias=None):
            return attend(self, x, CHANGES["scaled twice"])

    model, ran = model_with(Attention), []
    attention = model.blocks[0].attn
    tokens = noise(2, 5, 8, seed=3, dtype=torch.float64)
    attention.register_forward_hook(lambda *_: ran.append(1))
    with dinov2_attn.install(model):
        for _ in range(2):
            attention(tokens, return_attn=True, queries=1, heads="mean")
        assert len(ran) == 2
        for wrong in ({"heads": "max"}, {"queries": "first"}):
            with pytest.raises(InvalidInputError, match=r"max|first"):
                attention(tokens, return_attn=True, **wrong)


def test_features_in_another_dict():
    class Model(MOGE.cls("DinoVisionTransformer")):
        def forward_features(self, x, masks=None):
            return {"last": super().forward_features(x, masks)["x_prenorm"]}

        def forward(self, x):
            return self.forward_features(x)["last"]

    with right_in_every_way(model_with(model=Model), reference.weights):
        pass


def test_blocks_that_attend_to_something_else_answer_for_that():
    class NormTwice(MOGE.cls("NestedTensorBlock")):
        def forward(self, x):
            return x + self.attn(self.norm1(self.norm1(x)))

    model = model_with(block=NormTwice)
    with right_in_every_way(model, reference.weights) as status:
        parts_are_right(model, reference.weights)
    assert status.at_kernel[name(NormTwice)].startswith("expected the attention of a block to")


def blocks_of_another_number():
    base = MOGE.cls("NestedTensorBlock")

    class AttendTwice(base):
        def forward(self, x):
            return x + self.attn(self.norm1(x)) + self.attn(self.norm1(x))

    class NeverAttend(base):
        def forward(self, x):
            return x + self.mlp(self.norm2(x))

    return {"2 calls": AttendTwice, "none": NeverAttend}


@pytest.mark.parametrize("found", ["2 calls", "none"])
def test_a_block_that_attends_twice_or_never_says_so_when_asked(found):
    """Never an answer of one of two calls, in the first pass as in later ones."""
    model = model_with(block=blocks_of_another_number()[found])
    tokens = model.prepare_tokens_with_masks(IMAGES)
    with dinov2_attn.install(model):
        for _ in range(2):
            said = rf"(?s)blocks_of.*\.{type(model.blocks[0]).__name__} to call.*Found {found}"
            with pytest.raises(NotRecordedError, match=said):
                model.blocks[0](tokens, return_attention=True)
            with pytest.raises(dinov2_attn.Dinov2AttnError, match=r"record\(model"):
                model.get_self_attention(IMAGES)
            with pytest.raises(dinov2_attn.Dinov2AttnError, match=r"record\(model"):
                model.forward_features(IMAGES, return_attention=True)


# What calls no kernel, or two, is refused.


def by_hand(self, x, attn_bias=None):
    q, k, v = split(self, x)
    powers = (q @ k.transpose(-2, -1) * self.scale).exp()
    out = powers / powers.sum(-1, keepdim=True) @ v
    return self.proj(out.transpose(1, 2).reshape(x.shape))


def over_queries(self, x, attn_bias=None):
    q, k, v = split(self, x)
    out = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-2) @ v
    return self.proj(out.transpose(1, 2).reshape(x.shape))


def in_an_operator(self, x, attn_bias=None):
    q, k, v = split(self, x)
    out = torch._scaled_dot_product_attention_math(q, k, v)[0]
    return self.proj(out.transpose(1, 2).reshape(x.shape))


def by_flex_attention(self, x, attn_bias=None):
    from torch.nn.attention.flex_attention import flex_attention

    out = flex_attention(*split(self, x))
    return self.proj(out.transpose(1, 2).reshape(x.shape))


def differential(self, x, attn_bias=None):
    q, k, v = split(self, x)
    one, two = (F.scaled_dot_product_attention(q * s, k, v) for s in (1, 2))
    return self.proj((one - two / 2).transpose(1, 2).reshape(x.shape))


NO_KERNEL = {
    "exp and a sum": (by_hand, "none in"),
    "softmax over queries": (over_queries, "none in a pass"),
    "an operator": (in_an_operator, "none in"),
    "flex_attention": (by_flex_attention, "none in"),
    "two kernels": (differential, "2 calls"),
}


def without_kernel(forward, base=nn.Module):
    """Return an attention class without a kernel, alone or over upstream's."""

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super(Attention, self).__init__(*(() if base is nn.Module else (dim, num_heads, qkv_bias)))
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    body = {
        "forward": forward,
        "__init__": __init__,
        "__module__": __name__ if base is nn.Module else base.__module__,
    }
    Attention = type("Attention", (base,), body)
    return Attention


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("forward", "found"), NO_KERNEL.values(), ids=NO_KERNEL)
def test_what_calls_no_kernel_or_two_is_refused(forward, found, alone):
    cls = without_kernel(forward, nn.Module if alone else MOGE.cls("Attention"))
    if forward is by_flex_attention and not alone:
        pytest.skip("whether it runs on the CPU in float64 differs from torch to torch")
    with pytest.raises(
        IncompatibleUpstreamError, match=f"to call one kernel once.*\nFound {found}"
    ):
        dinov2_attn.install(cls(12, num_heads=2))
    assert vars(cls)["forward"] is forward
    assert dinov2_attn.status().grafted == ()


def test_weights_at_a_kernel_that_drops_some_are_those_before():
    """Its output is not made of them, so it proves nothing."""

    class Dropping(MOGE.cls("Attention")):
        def forward(self, x, attn_bias=None):
            q, k, v = split(self, x)
            p = 0.5 if self.training else 0.0
            out = F.scaled_dot_product_attention(q * 2, k, v, dropout_p=p)
            return self.proj(out.transpose(1, 2).reshape(x.shape))

    model = model_with(Dropping)
    tokens = noise(2, 5, 8, seed=3, dtype=torch.float64)
    with dinov2_attn.install(model):
        for block in model.blocks:
            q, k, _ = split(block.attn, tokens)
            for training in (True, False, True):
                weights = block.train(training).attn(tokens, return_attn=True)
                assert_close(weights, softmax_of(q * 2, k))


def test_the_error_of_a_class_that_cannot_be_built_is_the_cause(monkeypatch):
    cls = without_kernel(by_hand)
    attention, failure = cls(12, num_heads=2), ValueError("needs a license")

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(cls, "__init__", fail)
    with pytest.raises(IncompatibleUpstreamError) as caught:
        dinov2_attn.install(attention)
    assert caught.value.__cause__.__cause__ is failure


def test_a_sibling_that_is_refused_is_left_out(monkeypatch):
    """The rest of its package works, and status() says which class does not."""
    module = MOGE.module(MOGE.attention)
    wrong = without_kernel(by_hand, module.Attention)
    monkeypatch.setattr(module, "Wrong", wrong, raising=False)
    model = model_with()
    with dinov2_attn.install(MOGE.package):
        status = dinov2_attn.status()
        assert list(status.left_out) == [name(wrong)]
        assert "none in" in status.left_out[name(wrong)]
        assert f"left out: {name(wrong)}: expected" in str(status)
        assert vars(wrong)["forward"] is by_hand
        assert len(model.get_self_attention(IMAGES)) == 3
    assert dinov2_attn.status().left_out == {}


def test_a_model_with_one_block_that_cannot_be_seen_answers_for_the_others():
    model = model_with()
    cls = without_kernel(by_hand, MOGE.cls("Attention"))
    model.blocks[0].attn.__class__ = cls
    expected = expected_weights(model, reference.weights)
    with dinov2_attn.install(model):
        assert name(cls) in dinov2_attn.status().left_out
        assert_all_close(model.get_self_attention(IMAGES, [1, 2]), expected[1:])
        with pytest.raises(dinov2_attn.Dinov2AttnError):
            model.get_self_attention(IMAGES)
    assert dinov2_attn.status().left_out == {}


# A package in which nothing is found.


@pytest.mark.parametrize("target", ["json", "logging"])
def test_a_package_without_attention_says_so_at_once(target):
    __import__(target)
    said = (
        rf"(?s)attention modules with qkv, proj.*none in {target}.*record\(model\) needs no install"
    )
    with pytest.raises(IncompatibleUpstreamError, match=said):
        dinov2_attn.install(target)
    assert str(dinov2_attn.status()) == "nothing installed"


def package(folder, monkeypatch, **files):
    monkeypatch.syspath_prepend(folder)
    for path, text in files.items():
        file = folder / f"{path.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_a_package_without_attention_says_so_when_it_is_imported(tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, imported_later__a="x = 1", imported_later__b="y = 2")
    (tmp_path / "imported_later" / "__init__.py").write_text("from imported_later import a")
    dinov2_attn.install("imported_later")
    assert dinov2_attn.status().pending == ("imported_later",)
    for _ in range(2):  # the second import must not succeed with nothing said
        with pytest.raises(IncompatibleUpstreamError, match="none in imported_later"):
            import imported_later  # noqa: F401
    assert dinov2_attn.status().recognised["imported_later"].startswith("refused: expected")


@pytest.mark.parametrize("depth", ["layers", "deep__layers"])
def test_a_package_whose_attention_is_not_imported_yet_is_pending(tmp_path, monkeypatch, depth):
    """Its source says that there is some."""
    top = f"lazy_{len(depth)}"
    package(tmp_path, monkeypatch, **{f"{top}__{depth}": "def f(self):\n    self.qkv = 1\n"})
    (tmp_path / top / "__init__.py").write_text("")
    if "__" in depth:
        (tmp_path / top / "deep" / "__init__.py").write_text("")
    __import__(top)
    with dinov2_attn.install(top):
        assert dinov2_attn.status().pending == (top,)


def test_a_model_without_attention_names_what_needs_no_install():
    with pytest.raises(IncompatibleUpstreamError, match=r"(?s)none in torch.nn.*record\(model\)"):
        dinov2_attn.install(nn.Linear(2, 2))


def test_an_argument_that_a_block_at_its_kernel_does_not_take():
    class Block(MOGE.cls("NestedTensorBlock")):
        def forward(self, x, rope=None):
            return super().forward(x)

    model = model_with(block=Block)
    tokens = model.prepare_tokens_with_masks(IMAGES)
    with dinov2_attn.install(model), pytest.raises(InvalidInputError):
        model.blocks[0](tokens, return_attention=True, heads=0)


@pytest.mark.skipif(not compiles(), reason="this torch cannot compile on this Python: it is eager")
def test_what_is_taken_at_the_kernel_cannot_be_asked_in_a_graph():
    class Attention(MOGE.cls("Attention")):
        def forward(self, x, attn_bias=None):
            return attend(self, x, next(iter(CHANGES.values())))

    model = model_with(Attention)
    with dinov2_attn.install(model):
        compiled = torch.compile(model, backend="eager")
        for ask in (
            torch.no_grad()(lambda x: compiled(x, return_attention=True)),
            torch.no_grad()(torch.compile(lambda x: model.get_self_attention(x), backend="eager")),
            torch.func.grad(lambda x: model.get_self_attention(x)[0].sum()),
        ):
            with pytest.raises(NotRecordedError, match=r"taken at its kernel.\nFound .*Attention"):
                ask(IMAGES)
        weights = compiled._orig_mod.get_self_attention(IMAGES)
        assert_all_close(weights, model.get_self_attention(IMAGES))
