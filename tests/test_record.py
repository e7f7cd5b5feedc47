"""`record`: an ordinary pass leaves its attention, and is not changed by that."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import dinov2_attn
import reference
import upstreams
from dinov2_attn import record
from dinov2_attn.surgery.tap import TAP
from strategies import model_cases, noise, randomise
from test_machinery import compiles
from tolerances import assert_close
from xformers_here import quiet

IMAGES = noise(2, 3, 4, 6, seed=0, dtype=torch.float64)
N = 1 + 2 * 3

queries = st.sampled_from([None, "cls", "registers", "patches", 0, [0, -1], slice(None, None, 2)])
heads = st.sampled_from([None, "mean"])


def build(upstream, **options):
    options = {"depth": 3, "block_chunks": 0, **options}
    model = upstream.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=8, num_heads=2, **options
    )
    for parameter in model.parameters():
        parameter.requires_grad_()  # RoMa freezes its copy
    return randomise(model.double(), 1)


class Adapted(nn.Linear):
    """LoRA's way: a projection of another class around the one that was there."""

    def __init__(self, inner):
        super().__init__(inner.in_features, inner.out_features, dtype=torch.float64)
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + super().forward(x)


class Around(nn.Module):
    """A wrapper that hands no keywords on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Containing(nn.Module):
    """A model around a DINOv2, such as Depth Anything's head over intermediate layers."""

    def __init__(self, backbone, use):
        super().__init__()
        self.pretrained, self.use, self.head = backbone, use, nn.Linear(8, 3).double()

    def forward(self, x):
        return self.head(self.use(self.pretrained, x))


USES = {
    "classifier": lambda m, x: m(x),
    "depth": lambda m, x: m.get_intermediate_layers(x, 2, return_class_token=True)[0][0],
    "dense": lambda m, x: m.forward_features(x)["x_norm_patchtokens"],
    "loop": lambda m, x: _loop(m, x),
}


def _loop(model, tokens):
    tokens = model.prepare_tokens_with_masks(tokens)
    for block in model.blocks:
        tokens = block(tokens)
    return tokens


def assert_nothing_on(model):
    assert TAP.recorders == ()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def assert_all_close(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


# The same weights as every other way


@given(case=model_cases(), queries=queries, heads=heads, grad=st.booleans(), data=st.data())
def test_a_recording_is_what_get_self_attention_returns(models, case, queries, heads, grad, data):
    model = case.build(models)
    some = st.lists(st.integers(-case.depth, case.depth - 1), min_size=1)
    n = data.draw(st.one_of(st.none(), st.integers(1, case.depth), some))
    with torch.set_grad_enabled(grad), record(model, n, queries=queries, heads=heads) as maps:
        output = model(case.images, masks=case.masks)
    assert torch.equal(output, model(case.images, masks=case.masks))
    expected = model.get_self_attention(case.images, n, case.masks, queries=queries, heads=heads)
    assert len(maps.weights) == len(maps.layers) == len(expected)
    assert_all_close(maps.weights, expected)
    assert [w.dtype for w in maps.weights] == [case.dtype] * len(expected)
    assert maps.grid == case.grid
    assert maps.prefix == case.prefix(models)
    if n is not None and not isinstance(n, int):
        assert maps.layers == tuple(sorted({i % case.depth for i in n}))
    assert_nothing_on(model)


@given(case=model_cases())
def test_a_recording_is_the_attention_by_its_definition(models, case):
    model = case.build(models)
    inputs = []
    attentions = [m for m in model.modules() if hasattr(m, "qkv")]
    hooks = [m.register_forward_pre_hook(lambda m, a: inputs.append((m, *a))) for m in attentions]
    with record(model) as maps:
        model(case.images)
    for hook in hooks:
        hook.remove()
    for weights, (module, tokens) in zip(maps.weights, inputs, strict=True):
        assert_close(weights, reference.weights(module, tokens))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("chunks", [0, 2])
def test_a_model_that_contains_one_is_recorded(models, use, chunks):
    if use == "loop" and chunks:
        pytest.skip("a flat model's loop: the other uses run chunked ones")
    inner = build(models, block_chunks=chunks, depth=4)
    model = Containing(inner, USES[use])
    expected = model(IMAGES)
    with record(model, queries="cls") as maps:
        assert torch.equal(model(IMAGES), expected)
    assert_all_close(maps.weights, inner.get_self_attention(IMAGES, queries="cls"))
    assert maps.grid == (2, 3)


@quiet
@given(case=model_cases(), queries=queries, heads=heads)
def test_a_nested_list_gives_lists(nested, case, queries, heads):
    model = case.build(nested)
    images = [case.images, noise(2, 3, 2, 6, seed=case.seed, dtype=case.dtype)]
    if nested is upstreams.MOGE:  # its own forward_features_list unpacks three of two
        tokens = [model.prepare_tokens_with_masks(x) for x in images]
        run = lambda: model.blocks[0](tokens)  # noqa: E731
        model, n = (model, [0]) if not case.chunks else pytest.skip("a chunk is no block")
    else:
        run, n = (lambda: model(images, masks=[None, None], is_training=True)), None
    plain = run()
    with record(model, n, queries=queries, heads=heads) as maps:
        again = run()
    expected = model.get_self_attention(images, n, queries=queries, heads=heads)
    for ours, theirs in zip(maps.weights, expected, strict=True):
        assert isinstance(ours, list)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)
    if nested is not upstreams.MOGE:
        assert maps.grid == [case.grid, (1, 3)]
        assert all(
            torch.equal(a["x_prenorm"], b["x_prenorm"]) for a, b in zip(plain, again, strict=True)
        )


@quiet
def test_a_single_tensor_through_xformers_is_recorded(nested):
    model = build(nested)
    with record(model) as maps:
        model(IMAGES)
    assert all(map(torch.equal, maps.weights, model.get_self_attention(IMAGES)))


def test_causal_attention_is_recorded_as_causal(models):
    """CausalAttentionBlock passes ``is_causal`` by position."""
    if not hasattr(models.module(models.block), "CausalAttentionBlock"):
        pytest.skip("this copy has no causal block; a checkout of the newest era has")
    block = models.cls("CausalAttentionBlock")(8, 2).double()
    model = build(models)
    model.blocks[1] = block
    with record(model) as maps:
        model(IMAGES)
    assert not maps.weights[1].triu(1).any()
    assert all(map(torch.equal, maps.weights, model.get_self_attention(IMAGES)))


# The pass is what it was


@given(case=model_cases(), drop_path=st.sampled_from([0.0, 0.05, 0.5]), training=st.booleans())
def test_outputs_gradients_and_draws_are_bit_identical(models, case, drop_path, training):
    model = case.build(models, drop_path_rate=drop_path, drop_path_uniform=True)
    for parameter in model.parameters():
        parameter.requires_grad_()
    model.train(training)

    def run():
        torch.manual_seed(0)
        model.zero_grad()
        output = model(case.images, masks=case.masks, is_training=True)["x_prenorm"]
        output.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [output, torch.get_rng_state(), *grads]

    before = run()
    with record(model):
        after = run()
    assert len(before) == len(after)
    assert all(map(torch.equal, before, after))


def test_queries_and_keys_are_projected_once(models):
    model, calls = build(models), []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    with record(model), record(model, queries="cls"):
        model(IMAGES)
    assert len(calls) == 3


def test_a_projection_that_draws_is_recorded_as_it_was_drawn(models):
    model, seen = build(models).train(), []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda *a: nn.functional.dropout(a[-1], 0.5))
        block.attn.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
    torch.manual_seed(3)
    plain = model(IMAGES)
    seen.clear()
    torch.manual_seed(3)
    with record(model) as maps:
        assert torch.equal(model(IMAGES), plain)
    assert not any(map(torch.equal, maps.weights, model.eval().get_self_attention(IMAGES)))


def test_hooks_and_adapters_on_the_projection_have_their_say(models):
    model = build(models)
    model.blocks[1].attn.qkv.register_forward_hook(lambda _, __, out: out * 3)
    model.blocks[2].attn.qkv = Adapted(model.blocks[2].attn.qkv)
    with record(model) as maps:
        model(IMAGES)
    expected = model.get_self_attention(IMAGES)
    assert_all_close(maps.weights, expected)
    assert not torch.equal(expected[1], expected[0])
    assert len(model.blocks[1].attn.qkv._forward_hooks) == 1


def test_gradients_flow_through_what_is_recorded(models):
    model = build(models)
    with record(model) as maps:
        model(IMAGES)
    maps.weights[2].square().sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.get_last_self_attention(IMAGES).square().sum().backward()
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_stochastic_depth_leaves_the_weights_of_the_samples_that_ran(models):
    model = build(models, drop_path_rate=0.5, drop_path_uniform=True).train()
    seen = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
    with record(model) as maps:
        model(IMAGES.repeat(2, 1, 1, 1))
    for weights, (module, tokens) in zip(maps.weights, seen, strict=True):
        assert len(weights) == 2
        assert_close(weights, reference.weights(module, tokens))


# reduce


def test_reduce_decides_what_is_kept(models):
    model = build(models)
    with record(model, [0, 2], reduce=lambda layer, w: (layer, w.sum())) as maps:
        model(IMAGES)
    assert maps.layers == (0, 2)
    assert [layer for layer, _ in maps.weights] == [0, 2]
    assert all(
        torch.isclose(total, torch.tensor(2.0 * 2 * N).double()) for _, total in maps.weights
    )


@pytest.mark.parametrize("grad", [False, True])
def test_a_full_matrix_does_not_outlive_its_layer(models, grad):
    model, alive, most = build(models), weakref.WeakSet(), []

    def reduce(layer, weights):
        alive.add(weights)
        gc.collect()
        most.append(len(alive))
        return weights.detach().mean()

    with torch.set_grad_enabled(grad), record(model, reduce=reduce):
        model(IMAGES)
    assert most == [1, 1, 1]
    gc.collect()
    assert not alive


def test_what_is_recorded_with_a_graph_is_freed_with_it(models):
    model = build(models)
    with record(model) as maps:
        model(IMAGES)
    last = weakref.ref(maps.weights[-1])
    del maps
    gc.collect()
    assert last() is None


# Several passes, several recordings


def test_every_pass_has_its_maps(models):
    model = build(models)
    batches = [IMAGES, IMAGES[:1, :, :2], IMAGES]
    with torch.no_grad(), record(model, 2, queries="cls") as maps:
        for i, images in enumerate(batches):
            model(images)
            assert len(maps.passes) == i + 1
    for one, images in zip(maps.passes, batches, strict=True):
        expected = model.get_self_attention(images, 2, queries="cls")
        assert_all_close(one.weights, expected)
    assert [one.grid for one in maps.passes] == [(2, 3), (1, 3), (2, 3)]
    with pytest.raises(dinov2_attn.NotRecorded, match=r"one recorded pass.*found 3.*\.passes"):
        _ = maps.weights
    with pytest.raises(AttributeError, match="nothing_like_that"):
        _ = maps.nothing_like_that
    assert len(copy.deepcopy(maps).passes) == 3
    assert len(pickle.loads(pickle.dumps(maps)).passes) == 3


def test_passes_may_be_taken_as_they_come(models):
    model = build(models)
    with record(model) as maps:
        for _ in range(3):
            model(IMAGES)
            assert maps.weights[0].shape == (2, 2, N, N)
            maps.passes.clear()
    assert maps.passes == []


def test_recordings_may_be_nested(models):
    model, other = build(models), build(models, depth=2)
    both = nn.ModuleList([model, other])
    with record(model) as outer:
        with record(model, 1, queries="cls", heads="mean") as inner, record(other) as second:
            model(IMAGES)
            other(IMAGES)
        model(IMAGES)
        assert len(inner.passes) == len(second.passes) == 1
    assert len(outer.passes) == 2
    assert all(map(torch.equal, outer.passes[0].weights, outer.passes[1].weights))
    assert_close(inner.weights[0], outer.passes[0].weights[2][:, :, :1].mean(1))
    assert len(second.weights) == 2
    assert_nothing_on(both)


def test_what_is_asked_inside_is_answered_and_not_recorded(models):
    model = build(models)
    expected = model.get_self_attention(IMAGES)
    with record(model) as maps:
        assert all(map(torch.equal, model.get_self_attention(IMAGES), expected))
        assert torch.equal(model.get_last_self_attention(IMAGES), expected[-1])
        assert len(model.get_self_attention([IMAGES, IMAGES], 2)) == 2
        tokens = model.prepare_tokens_with_masks(IMAGES)
        model.blocks[0](tokens, return_attention=True)
        model.blocks[0].attn(tokens, return_attn=True)
        assert maps.passes == []
        _, attentions = model(IMAGES, return_attention=True)
    assert len(maps.passes) == 1
    for a, b, c in zip(maps.weights, attentions, expected, strict=True):
        assert_close(a, b)
        assert_close(a, c)


def test_reduce_may_run_models_itself(models):
    model = build(models)
    with record(model, reduce=lambda layer, w: model(IMAGES)) as maps:
        expected = model(IMAGES)
    assert len(maps.passes) == 1
    assert all(torch.equal(kept, expected) for kept in maps.weights)


def test_threads_do_not_see_each_other(models):
    model, failures, counts = build(models), [], []
    expected = model.get_self_attention(IMAGES)

    def work(recording):
        try:
            for _ in range(10):
                if not recording:
                    model(IMAGES)
                    continue
                with record(model) as maps:
                    model(IMAGES)
                counts.append(len(maps.passes))
                assert_all_close(maps.weights, expected)
        except BaseException as error:  # reported below, out of the thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i < 3,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert counts == [1] * 30
    assert_nothing_on(model)


def test_a_pass_in_another_thread_is_not_recorded(models):
    model, other = build(models), ThreadPoolExecutor(1)
    with pytest.raises(dinov2_attn.NotRecorded, match="in the same thread"), record(model):
        other.submit(model, IMAGES).result()
    other.shutdown()


# What was missed is said


def test_nothing_recorded_is_an_error(models):
    model = build(models)
    with (
        pytest.raises(dinov2_attn.NotRecorded, match=r"layers 0, 1, 2; found 0 of them\."),
        record(model),
    ):
        pass
    assert_nothing_on(model)


@pytest.mark.parametrize("blocks", [[0], [1], [2]])
@pytest.mark.parametrize("order", [[True, False], [False, True], [True, False, True]])
def test_a_pass_without_some_layers_is_an_error(models, blocks, order):
    """As where a block was exported or scripted: something without a graft runs in its place."""
    model, caught = build(models), []
    attentions = [model.blocks[i].attn for i in blocks]

    def run():
        with record(model) as maps:
            caught.append(maps)
            for sees in order:
                for attention in attentions:
                    vars(attention).pop("forward", None)
                    if not sees:
                        attention.forward = lambda x: x
                model(IMAGES)

    words = rf"layers 0, 1, 2; found {sum(order)} of them, and 1 without"
    with pytest.raises(dinov2_attn.NotRecorded, match=words):
        run()
    assert len(caught[0].passes) == sum(order)


def test_a_failing_pass_leaves_nothing_on_and_no_maps(models):
    model = build(models)

    def fail(*_):
        raise ZeroDivisionError

    for place in (model.blocks[1].mlp, model.blocks[1].attn.qkv, model.blocks[1].attn.proj):
        hook = place.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError), record(model) as maps:
            model(IMAGES)
        hook.remove()
        assert maps.passes == []
        assert_nothing_on(model)
    with pytest.raises(ZeroDivisionError), record(model, reduce=fail):
        model(IMAGES)
    assert_nothing_on(model)
    with record(model) as maps:
        model(IMAGES)
    assert len(maps.passes) == 1


def test_what_cannot_be_recorded_is_refused_at_once(models):
    model = build(models)
    cases = [
        (nn.Linear(2, 2), {}, dinov2_attn.InvalidInput, "one DINOv2 inside .*; found none"),
        ("model", {}, dinov2_attn.InvalidInput, "a model"),
        (nn.ModuleDict({"teacher": model, "student": build(models)}), {},
         dinov2_attn.InvalidInput, "found 2: teacher, student"),
        (model, {"n": 4}, dinov2_attn.OutOfRange, "between 0 and 3"),
        (model, {"n": []}, dinov2_attn.InvalidInput, "at least one layer"),
        (model, {"queries": "cs"}, dinov2_attn.InvalidInput, "cls"),
        (model, {"heads": "max"}, dinov2_attn.InvalidInput, "heads"),
        (model, {"reduce": "mean"}, dinov2_attn.InvalidInput, "reduce"),
    ]  # fmt: skip
    for subject, options, error, words in cases:
        with pytest.raises(error, match=words), record(subject, **options):
            raise AssertionError("entered")
        assert TAP.recorders == ()


def test_a_model_that_was_never_grafted_is_refused(models):
    model = build(models)
    dinov2_attn.uninstall()
    try:
        with pytest.raises(dinov2_attn.NotGrafted, match=r"install\(model\)"), record(model):
            raise AssertionError("entered")
    finally:
        dinov2_attn.install(models.package)


# PyTorch's own machinery


compiling = [
    pytest.mark.skipif(not compiles(), reason="this torch cannot compile on this Python"),
    pytest.mark.filterwarnings("ignore"),  # Dynamo's own differ from version to version
]


class Graphs:
    """A backend that counts how often its graphs run."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, _):
        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def wholly(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def block_by_block(model, backend):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend=backend)
    return model


def attention_by_attention(model, backend):
    for block in model.blocks:
        block.attn.compile(backend=backend)
    return model


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("way", [wholly, in_place, block_by_block, attention_by_attention])
@pytest.mark.parametrize("first", ["compiled", "recorded"])
class TestCompiled:
    pytestmark = compiling

    def test_a_compiled_model_is_refused_and_never_missed(self, models, way, first):
        model, graphs = build(models), Graphs()
        expected, weights = model(IMAGES), model.get_self_attention(IMAGES)
        compiled = way(model, graphs)
        if first == "compiled":
            assert_close(compiled(IMAGES), expected)
            assert graphs.runs
        for _ in range(2):
            with pytest.raises(dinov2_attn.NotRecorded, match="_orig_mod"), record(compiled):
                compiled(IMAGES)
            with in_eager_mode(), record(compiled) as maps:
                assert_close(compiled(IMAGES), expected)
            assert_all_close(maps.weights, weights)
        graphs.runs = 0
        assert_close(compiled(IMAGES), expected)
        assert graphs.runs


def in_eager_mode():
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("this torch has no stances: the refusal before is what it gives")
    return torch.compiler.set_stance("force_eager")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("first", ["compiled", "recorded"])
class TestFullGraph:
    pytestmark = compiling

    def test_a_single_graph_is_refused_and_works_again_afterwards(self, models, first):
        model, graphs = build(models), Graphs()
        expected = model(IMAGES)
        compiled = torch.compile(model, backend=graphs, fullgraph=True)
        if first == "compiled":
            assert_close(compiled(IMAGES), expected)
        with pytest.raises(dinov2_attn.NotRecorded, match="_orig_mod"), record(compiled):
            compiled(IMAGES)
        graphs.runs = 0
        assert_close(compiled(IMAGES), expected)
        assert graphs.runs == 1
        with record(compiled) as maps:
            model(IMAGES)
        assert len(maps.passes) == 1

    def test_somebody_elses_graph_runs_inside(self, models, first):
        model, other = build(models), build(models, depth=1)
        compiled = torch.compile(other, backend="eager", fullgraph=True)
        if first == "compiled":
            compiled(IMAGES)
        with record(model) as maps:
            model(IMAGES)
            assert_close(compiled(IMAGES), other(IMAGES))
        assert len(maps.passes) == 1


@pytest.mark.usefixtures("fresh_dynamo")
class TestCompiledProjection:
    pytestmark = compiling

    def test_a_projection_that_no_hook_reaches_is_refused(self, models):
        """Its graph was made when there was none."""
        model = build(models)
        model.blocks[1].attn.qkv.compile(backend="eager")
        expected = model(IMAGES)
        try:
            with record(model) as maps:
                assert torch.equal(model(IMAGES), expected)
        except dinov2_attn.NotRecorded as error:
            assert "0 calls" in str(error)  # noqa: PT017  # a torch that guards hooks records
        else:
            assert_all_close(maps.weights, model.get_self_attention(IMAGES))
        assert_nothing_on(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not (compiles() and hasattr(torch, "export")), reason="no torch.export here")
@pytest.mark.parametrize("strict", [True, False])
def test_exports_are_refused(models, strict):
    model = build(models)
    with pytest.raises(dinov2_attn.NotRecorded, match="torch.export"), record(model):
        torch.export.export(model, (IMAGES,), strict=strict)
    assert_nothing_on(model)
    exported = torch.export.export(model, (IMAGES,), strict=strict).module()
    assert_close(exported(IMAGES), model(IMAGES))
    with pytest.raises(dinov2_attn.NotRecorded, match="found 0"), record(model):
        exported(IMAGES)


def test_function_transforms_are_refused(models):
    """What is recorded there would be wrappers that are dead afterwards."""
    model = build(models)
    with pytest.raises(dinov2_attn.NotRecorded, match="torch.func"), record(model):
        torch.func.grad(lambda x: model(x).sum())(IMAGES)
    assert_nothing_on(model)


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["block", "model"])
def test_checkpointing_is_recorded_once_and_differentiates(models, reentrant, where):
    model = build(models)
    images = IMAGES.clone().requires_grad_()
    expected = model.get_self_attention(images)
    model(images).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    subject = model
    if where == "model":
        subject = Checkpointed(model, reentrant)
    else:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = Checkpointed(block, reentrant)
    with record(subject) as maps:
        subject(images).square().sum().backward()
    assert len(maps.passes) == 1
    assert_all_close(maps.weights, expected)
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, again, grads))
    if not reentrant:
        model.zero_grad()
        with record(subject) as maps:
            subject(images)
        maps.weights[2].square().sum().backward()  # behind the block: recomputes for it
        recomputed = model.patch_embed.proj.weight.grad.clone()
        model.zero_grad()
        expected[2].square().sum().backward()
        assert_close(recomputed, model.patch_embed.proj.weight.grad)


def test_copies_pickles_and_states_know_of_no_recording(models):
    model = build(models)
    keys, attributes = list(model.state_dict()), set(vars(model))
    with record(model):
        model(IMAGES)
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        assert list(model.state_dict()) == keys
        assert set(vars(model)) == attributes
        assert_nothing_on_modules(twin)
        twin(IMAGES)  # another model: not recorded
    buffer.seek(0)
    options = {} if torch.__version__ < "2.1" else {"weights_only": False}
    for other in (twin, torch.load(buffer, **options)):
        assert_nothing_on(other)
        with record(other) as maps:
            other(IMAGES)
        assert all(map(torch.equal, maps.weights, model.get_self_attention(IMAGES)))


def assert_nothing_on_modules(model):
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_autocast_is_recorded_in_the_dtype_of_the_kernel(models):
    model = build(models).float()
    with torch.autocast("cpu", dtype=torch.bfloat16), record(model) as maps:
        model(IMAGES.float())
    assert {w.dtype for w in maps.weights} == {torch.bfloat16}


def test_the_public_names_are_there_when_they_are_asked_for():
    assert dinov2_attn.record is record
    assert {"record", "AttentionMaps", "Recording", "NotRecorded"} <= set(dinov2_attn.__all__)
    assert all(hasattr(dinov2_attn, name) for name in dinov2_attn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'recrod'"):
        _ = dinov2_attn.recrod


def test_wrappers_of_blocks_and_attention_are_looked_into(models):
    model = build(models)
    expected = model.get_self_attention(IMAGES)
    model.blocks[0] = Around(model.blocks[0])
    model.blocks[2].attn = Around(model.blocks[2].attn)
    with record(model) as maps:
        model(IMAGES)
    assert_all_close(maps.weights, expected)


def test_overrides_that_call_their_base_are_recorded_once(models):
    model = build(models)
    expected = model.get_self_attention(IMAGES)
    names = {"prepare_tokens_with_masks": None, "forward_features": None}
    for name in names:
        names[name] = _handing_on(model, name)
    model.__class__ = type("Own", (type(model),), names)
    attention = model.blocks[1].attn
    attention.__class__ = type(
        "Own", (type(attention),), {"forward": _handing_on(attention, "forward")}
    )
    with dinov2_attn.install(model), record(model) as maps:
        model(IMAGES)
    assert_all_close(maps.weights, expected)
    assert maps.grid == (2, 3)


@quiet
def test_the_grids_of_a_list_are_those_of_its_elements_under_an_override_too(nested):
    block = partial(nested.cls("NestedTensorBlock"), attn_class=nested.cls("MemEffAttention"))
    model = build(nested, block_fn=block)
    name = "prepare_tokens_with_masks"
    model.__class__ = type("Own", (type(model),), {name: _handing_on(model, name)})
    with dinov2_attn.install(model), record(model, [0]) as maps:
        model.prepare_tokens_with_masks(IMAGES)  # and not used
        model.blocks[0]([model.prepare_tokens_with_masks(x) for x in (IMAGES, IMAGES[..., :2])])
        model.prepare_tokens_with_masks(IMAGES)  # and not used
        model.blocks[0](noise(1, 6, 8, seed=0).double())
    assert [one.grid for one in maps.passes] == [[(2, 3), (2, 1)], None]


def test_a_projection_that_runs_twice_is_refused(models):
    """Which of the two the kernel uses cannot be told."""
    model = build(models)
    attention = model.blocks[1].attn
    base = type(attention)

    def forward(self, x):
        self.qkv(x)
        return base.forward(self, x)

    attention.__class__ = type("Own", (base,), {"forward": forward})
    with dinov2_attn.install(model):
        with pytest.raises(dinov2_attn.NotRecorded, match="2 calls"), record(model):
            model(IMAGES)
        assert_nothing_on(model)


def _handing_on(module, name):
    cls = type(module)
    return lambda self, x, *others: getattr(cls, name)(self, x, *others)


def test_wrapped_and_data_parallel_models_are_found(models):
    model = build(models)
    wrapped = nn.Sequential(nn.DataParallel(model))  # on a CPU it calls the module itself
    with record(wrapped) as maps:
        wrapped(IMAGES)
    assert all(map(torch.equal, maps.weights, model.get_self_attention(IMAGES)))
