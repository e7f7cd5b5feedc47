"""Artifact tokens: found where they were planted, by numbers that NumPy makes anew."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import dinov2_attn
from dinov2_attn import ArtifactTokens, artifact_tokens, record
from dinov2_attn.backbone.backbone import flat_blocks
from dinov2_attn.backbone.structure import Role, role_of_module
from dinov2_attn.errors import (
    InvalidInputError,
    OutOfRangeError,
    SuspiciousArtifactsWarning,
)
from dinov2_attn.maps.find_artifacts import Rule
from tests.support import reference
from tests.support.recordings import IMAGES, assert_nothing_on, build
from tests.support.strategies import ModelCase, model_cases, noise
from tests.support.tolerances import assert_close, assert_same_bits, same_bits

# Models of a few features have norms of all sizes: what is flagged there is looked at elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:more than 10%")

CASE = ModelCase(
    depth=4, chunks=0, registers=3, heads=3, grid=(5, 6), batch=2, dtype=torch.float64, seed=5
)


class Planted:
    """Make tokens large behind one block of a real model, and small again behind the next."""

    def __init__(self, model, layer, places, factor=1000.0):
        self._blocks, self._layer = flat_blocks(model.blocks), layer
        self._places, self._factor = places, factor

    def __enter__(self):
        def times(factor):
            def hook(_, __, output):
                if isinstance(output, list):  # the last block, asked for queries and keys
                    return output
                output = output.clone()
                for sample, token in self._places:
                    output[sample, token] *= factor
                return output

            return hook

        hooks = [self._blocks[self._layer].register_forward_hook(times(self._factor))]
        if self._layer + 1 < len(self._blocks):
            after = self._blocks[self._layer + 1]
            hooks.append(after.register_forward_hook(times(1 / self._factor)))
        self._hooks = hooks

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


def of_upstream(model, images, masks=None):
    """Outputs of all blocks and the last block's weights, of upstream's own forward pass."""
    outputs, inputs = [], []
    hooks = [
        b.register_forward_hook(lambda _, __, out: outputs.append(out))
        for b in flat_blocks(model.blocks)
    ]
    attentions = [m for m in model.modules() if role_of_module(m) is Role.ATTENTION]
    hooks.append(attentions[-1].register_forward_pre_hook(lambda _, a: inputs.append(a[0])))
    with torch.no_grad():
        model.forward_features(images, masks)
        for hook in hooks:
            hook.remove()
        return outputs, reference.weights(attentions[-1], inputs[-1])


def thresholds(norms, deviations=7.5, floor=2.5):
    """One image after the other, in NumPy."""
    found = []
    for image in np.asarray(norms, dtype=np.float64):
        median = np.median(image)
        spread = np.median(np.abs(image - median))
        found.append(max(median + deviations * spread, floor * median))
    return np.array(found)


def several_patches(case):
    """One patch alone stands out as little in every layer: a rounding chooses one."""
    return case.grid != (1, 1)


def norms_of(output, prefix, grid):
    return np.linalg.norm(output[:, prefix:].double().numpy(), axis=-1).reshape(-1, *grid)


# The numbers, on every copy, any grid, any number of registers


@given(case=model_cases(st.just(torch.float64)), masked=st.booleans())
def test_norms_and_shares_are_those_of_upstreams_own_pass(models, case, masked):
    assume(several_patches(case))
    model, prefix = case.build(models), case.prefix(models)
    masks = case.masks if masked else None
    found = artifact_tokens(model, case.images, masks=masks)
    outputs, weights = of_upstream(model, case.images, masks)
    inside = range(case.depth // 3, max(case.depth - 1, 1))
    each = {i: norms_of(outputs[i], prefix, case.grid) for i in inside}
    ratio = {i: n.max((1, 2)) / thresholds(n) for i, n in each.items()}
    layers = [max(inside, key=lambda i: ratio[i][image]) for image in range(case.batch)]
    assert found.layer.tolist() == layers
    expected = np.stack([each[layer][image] for image, layer in enumerate(layers)])
    assert_close(found.norms, torch.from_numpy(expected))
    assert_close(found.threshold, torch.from_numpy(thresholds(expected)))
    assert_same_bits(found.mask.numpy(), expected > thresholds(expected)[:, None, None])

    mean = weights.mean(1)
    shape = (case.batch, *case.grid)
    for ours, theirs, sinks in (
        (found.from_cls, mean[:, 0, prefix:], found.cls_sinks),
        (found.from_all, mean.mean(1)[:, prefix:], found.sinks),
    ):
        # Shares are summed with 1/N in float32.
        assert_close(ours, theirs.reshape(shape), dtype=torch.float32)
        limits = thresholds(ours)[:, None, None]
        assert_same_bits(sinks.numpy(), ours.numpy() > limits)
    held = (found.from_cls * found.mask).sum((1, 2))
    assert_close(found.share, held)


@given(case=model_cases(), layer=st.integers(-1, 0))
def test_a_layer_may_be_chosen(models, case, layer):
    model = case.build(models)
    found = artifact_tokens(model, case.images, layer)
    outputs, _ = of_upstream(model, case.images)
    assert found.layer.tolist() == [layer % case.depth] * case.batch
    expected = norms_of(outputs[layer], case.prefix(models), case.grid)
    assert_close(found.norms, torch.from_numpy(expected), dtype=case.dtype)


@given(case=model_cases())
def test_a_list_equals_one_by_one_and_chunked_equals_flat(models, case):
    assume(several_patches(case))
    images = [case.images, noise(1, 3, case.patch, 2 * case.patch, seed=1, dtype=case.dtype)]
    flat = case.build(models, chunks=0)
    each = [artifact_tokens(flat, one) for one in images]
    for model in (flat, case.build(models)):
        several = artifact_tokens(model, images, masks=[None, None])
        assert isinstance(several, list)
        for ours, alone in zip(several, each, strict=True):
            assert_same_bits(ours.layer, alone.layer)
            assert_close(ours.norms, alone.norms)
            assert_close(ours.from_all, alone.from_all)
            assert_same_bits(ours.mask, alone.mask)


@given(case=model_cases(st.just(torch.float64)), data=st.data())
def test_images_know_nothing_of_their_order(grafted, case, data):
    assume(several_patches(case))
    model = case.build(grafted)
    order = data.draw(st.permutations(range(case.batch)))
    found, other = (artifact_tokens(model, i) for i in (case.images, case.images[list(order)]))
    for name in ("norms", "threshold", "from_cls", "from_all"):
        assert_close(getattr(other, name), getattr(found, name)[list(order)])
    for name in ("mask", "layer"):
        assert_same_bits(getattr(other, name), getattr(found, name)[list(order)])


@given(case=model_cases(st.just(torch.float64)))
def test_images_know_nothing_of_who_is_in_their_batch(grafted, case):
    assume(several_patches(case))
    model = case.build(grafted)
    together = artifact_tokens(model, case.images)
    for i, image in enumerate(case.images):
        alone = artifact_tokens(model, image[None])
        assert alone.layer.item() == together.layer[i]
        assert_close(alone.norms[0], together.norms[i])
        assert_same_bits(alone.mask[0], together.mask[i])


# Planted


@given(
    data=st.data(),
    layer=st.sampled_from([1, 2]),
    registers=st.integers(0, 4),
    grid=st.tuples(st.integers(3, 6), st.integers(3, 6)),
)
def test_what_was_planted_is_found_and_where(grafted, data, layer, registers, grid):
    case = ModelCase(4, 2, registers, 3, grid, 2, torch.float32, 7)
    model, prefix = case.build(grafted), case.prefix(grafted)
    place = (data.draw(st.integers(0, grid[0] - 1)), data.draw(st.integers(0, grid[1] - 1)))
    sample = data.draw(st.integers(0, 1))
    token = prefix + place[0] * grid[1] + place[1]
    with Planted(model, layer, [(sample, token)]):
        found = artifact_tokens(model, case.images)
    assert found.layer[sample] == layer
    assert found.mask[(sample, *place)]
    plain = artifact_tokens(model, case.images, layer)
    others = torch.zeros_like(plain.mask)
    others[sample] = True
    others[(sample, *place)] = False
    # Of the others none is new: its own norm counts for nothing in a median.
    assert not (found.mask & others & ~plain.mask).any()
    entry = found.report()[sample]
    assert (entry["tokens"][0]["row"], entry["tokens"][0]["col"]) == place
    assert entry["tokens"][0]["norm"] == pytest.approx(1000 * float(plain.norms[(sample, *place)]))


def test_large_cls_and_registers_are_no_artifacts(models):
    model, prefix = CASE.build(models), CASE.prefix(models)
    plain = artifact_tokens(model, CASE.images, 1)
    with Planted(model, 1, [(i, token) for i in range(2) for token in range(prefix)]):
        found = artifact_tokens(model, CASE.images, 1)
    assert_same_bits(found.norms, plain.norms)
    assert_same_bits(found.mask, plain.mask)


def test_the_first_third_and_the_output_are_not_looked_at(grafted):
    model = build(grafted, depth=6)
    for layer, looked_at in enumerate([False, False, True, True, True, False]):
        with Planted(model, layer, [(0, 3)]):
            assert (artifact_tokens(model, IMAGES).layer[0] == layer) == looked_at
            assert artifact_tokens(model, IMAGES, layer).mask[0].flatten()[2]


def test_a_sink_is_seen_from_both_sides(grafted):
    """Keys that all queries like, of one patch: in the last block it receives nearly all."""
    model = CASE.build(grafted)
    with torch.no_grad():
        qkv = model.blocks[-1].attn.qkv
        width = qkv.in_features
        qkv.weight[:width] = 0
        qkv.bias[:width] = 1
        qkv.weight[width : 2 * width] = 1 / width
        qkv.bias[width : 2 * width] = 0
        model.blocks[-1].norm1.weight.fill_(1)
        model.blocks[-1].norm1.bias.fill_(0)

    class Loud(torch.nn.Module):
        """In place of the norm, which would take the sum of a token away."""

        def forward(self, tokens):
            loud = torch.zeros_like(tokens)
            loud[1, -2] = 9
            return loud

    model.blocks[-1].norm1 = Loud()
    found = artifact_tokens(model, CASE.images)
    expected = torch.zeros(2, 5, 6, dtype=torch.bool)
    expected[1, 4, 4] = True
    assert_same_bits(found.sinks, expected)
    assert_same_bits(found.cls_sinks, expected)
    assert found.from_cls[1, 4, 4] > 0.9
    (sink,) = found.report()[1]["sinks"]
    assert (sink["row"], sink["col"]) == (4, 4)
    assert sink["from_all"] == pytest.approx(float(found.from_all[1, 4, 4]))
    assert not same_bits(found.mask, expected)


# The rule


values = arrays(
    np.float64,
    array_shapes(min_dims=3, max_dims=3, max_side=6),
    elements=st.floats(0, 1e6, allow_subnormal=False).map(lambda x: round(x, 3)),
)


@given(values=values)
def test_the_rule_is_that_of_numpy(values):
    rule = Rule()
    tensor = torch.from_numpy(values)
    assert_close(rule.thresholds(tensor), thresholds(values))
    # At the threshold itself a rounding decides.
    limits = thresholds(values)[:, None, None]
    clear = np.abs(values - limits) > 1e-9 * limits
    ours, theirs = rule.outliers(tensor).numpy(), values > limits
    assert_same_bits(ours[clear], theirs[clear])


@given(values=values, power=st.integers(-30, 30))
def test_the_unit_of_norms_does_not_matter(values, power):
    scaled = torch.from_numpy(values * 2.0**power)
    assert_same_bits(Rule().outliers(scaled), Rule().outliers(torch.from_numpy(values)))


@given(values=values)
def test_never_as_many_as_half_are_outliers(values):
    outliers = Rule().outliers(torch.from_numpy(values))
    assert (outliers.flatten(1).double().mean(1) <= 0.5).all()


@given(shape=array_shapes(min_dims=3, max_dims=3), value=st.floats(0, 1e9))
def test_equal_norms_are_no_outliers(shape, value):
    same = torch.full(shape, value, dtype=torch.float64)
    assert not Rule().outliers(same).any()
    assert (Rule().excess(same) < 1).all()


def test_one_among_nothing_is_an_outlier_and_nan_is_none():
    alone = torch.zeros(1, 2, 3)
    alone[0, 1, 1] = 1e-6
    assert Rule().outliers(alone).sum() == 1
    assert Rule().excess(alone) > 1e30
    alone[0, 0, 0] = math.nan
    assert not Rule().outliers(alone).any()
    assert Rule().excess(alone) == 0


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf, "7", True, None])
@pytest.mark.parametrize("name", ["deviations", "floor"])
def test_a_rule_of_no_sense_is_an_error(grafted, name, wrong):
    with pytest.raises(InvalidInputError, match=f"Expected {name} as a number above 0"):
        artifact_tokens(build(grafted), IMAGES, **{name: wrong})


def test_a_rule_may_be_given(grafted):
    model = CASE.build(grafted)
    plain = artifact_tokens(model, CASE.images, 1)
    found = artifact_tokens(model, CASE.images, 1, deviations=0.5, floor=1.1)
    assert_close(found.threshold, thresholds(found.norms, 0.5, 1.1))
    assert found.mask.sum() > plain.mask.sum()


# Grids and tokens of all kinds


def test_one_patch_is_no_artifact(models):
    model = CASE.build(models)
    found = artifact_tokens(model, CASE.images[..., :2, :2])
    assert found.mask.shape == (2, 1, 1)
    assert not (found.mask | found.sinks | found.cls_sinks).any()
    assert found.report()[0]["tokens"] == []


def test_no_image_is_no_report(grafted):
    found = artifact_tokens(CASE.build(grafted), CASE.images[:0])
    assert found.mask.shape == (0, 5, 6)
    assert (found.report(), found.describe(), len(found.suspicious)) == ([], [], 0)


def test_constant_tokens_are_no_artifacts(models):
    model = CASE.build(models)
    with torch.no_grad():
        model.pos_embed.zero_()
    found = artifact_tokens(model, torch.ones_like(CASE.images))
    assert not (found.mask | found.sinks | found.cls_sinks).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_of_float32_at_least(models, dtype):
    """In half precision a norm of the size of artifacts has one digit."""
    model = CASE.build(models).to(dtype)
    found = artifact_tokens(model, CASE.images.to(dtype), 1)
    assert found.norms.dtype == found.threshold.dtype == found.from_cls.dtype == torch.float32


# Said


def test_the_report_is_json_and_says_all_of_it(grafted):
    model = CASE.build(grafted)
    with Planted(model, 2, [(1, 1 + 3 * 6 + 2), (1, 1 + 1 * 6 + 5)]):
        found = artifact_tokens(model, CASE.images)
    entries = json.loads(json.dumps(found.report(), allow_nan=False))
    assert len(entries) == 2
    entry = entries[1]
    places = {(token["row"], token["col"]) for token in entry["tokens"]}
    assert (
        places
        == {tuple(place) for place in found.mask[1].nonzero().tolist()}
        >= {
            (3, 2),
            (1, 5),
        }
    )
    assert (entry["layer"], entry["grid"]) == (2, [5, 6])
    assert entry["threshold"] == pytest.approx(float(found.threshold[1]))
    assert entry["median"] == pytest.approx(np.median(found.norms[1]))
    assert entry["share"] == pytest.approx(float(found.share[1]))
    sizes = [token["norm"] for token in entry["tokens"]]
    assert sizes == sorted(sizes, reverse=True)
    line = found.describe()[1]
    first = entry["tokens"][0]
    assert f"({first['row']}, {first['col']}) {first['norm']:.4g}" in line
    assert f"norm above {entry['threshold']:.4g} after block 2" in line
    assert f"hold {100 * entry['share']:.1f} % of CLS's attention" in line
    assert len(line.splitlines()) == 1


def test_numbers_that_are_none_are_none(grafted):
    model = CASE.build(grafted)
    with Planted(model, 1, [(0, 4)], factor=math.nan):
        found = artifact_tokens(model, CASE.images, 1)
    json.dumps(found.report(), allow_nan=False)
    assert found.report()[0]["threshold"] is None
    assert not found.mask[0].any()
    assert "no artifact tokens among 30 patches" in found.describe()[0]


def even(upstream):
    """Build a model of tokens that hardly differ, in place of those of random images."""
    model = CASE.build(upstream)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.patch_embed.proj.bias.fill_(1)
    return model


@pytest.mark.filterwarnings("error")
def test_too_many_are_warned_of_and_few_are_not(grafted):
    model = even(grafted)
    few, many = [(1, 1 + i) for i in range(3)], [(1, 1 + i) for i in range(4)]
    with Planted(model, 1, few):
        found = artifact_tokens(model, CASE.images)
    assert found.mask.sum() == 3
    assert found.suspicious.tolist() == [False, False]
    with (
        Planted(model, 1, many),
        pytest.warns(SuspiciousArtifactsWarning, match="in 1 of 2 images"),
    ):
        found = artifact_tokens(model, CASE.images)
    assert found.suspicious.tolist() == [False, True]
    assert found.describe()[1].endswith("; so many are no artifacts")
    # One of six is more than a tenth, and may well be one.
    with Planted(model, 1, few[:1]):
        found = artifact_tokens(model, CASE.images[..., :4, :6])
    assert found.mask.sum() == 1
    assert not found.suspicious.any()


def test_the_warning_is_of_the_line_that_asked(grafted):
    model = even(grafted)
    many = Planted(model, 1, [(1, 1 + i) for i in range(4)])
    with many, pytest.warns(SuspiciousArtifactsWarning) as caught:
        artifact_tokens(model, CASE.images)
    assert caught[0].filename == __file__


def made(norms, mask, *, cls_sinks=(), layer=3, threshold=2.5):
    """Artifacts of one image of one row, whose patches receive 1/100, 2/100 and so on."""
    width = len(norms)
    received = torch.arange(1, width + 1).reshape(1, 1, width) / 100

    def places(columns):
        return torch.tensor([column in columns for column in range(width)]).reshape(1, 1, width)

    return ArtifactTokens(
        mask=places(mask),
        norms=torch.tensor(norms).reshape(1, 1, width),
        layer=torch.tensor([layer]),
        threshold=torch.tensor([threshold]),
        from_cls=received,
        from_all=received / 2,
        cls_sinks=places(cls_sinks),
        sinks=places(()),
    )


def token(col, norm):
    shares = {
        name: pytest.approx((col + 1) / parts)
        for name, parts in (("from_cls", 100), ("from_all", 200))
    }
    return {"row": 0, "col": col, "norm": norm, **shares}


def test_a_report_word_by_word():
    found = made([1.0, 1.0, 4.0, 3.0], mask=[2, 3], cls_sinks=[0, 3])
    expected = {
        "grid": [1, 4],
        "layer": 3,
        "threshold": 2.5,
        "median": 2.0,
        "share": pytest.approx(0.07),
        "suspicious": True,
        "tokens": [token(2, 4.0), token(3, 3.0)],
        "cls_sinks": [token(3, 3.0), token(0, 1.0)],
        "sinks": [],
    }
    assert found.report() == [expected]


def test_a_description_word_by_word():
    """Up to six tokens are named; what is no number is a question mark."""
    (line,) = made([9.0, *[1.0] * 19, 12.3456], mask=[0, 20]).describe()
    assert line == (
        "2 of 21 patches with a norm above 2.5 after block 3: (0, 20) 12.35, (0, 0) 9; "
        "they hold 22.0 % of CLS's attention in the last block"
    )
    (line,) = made([1.0] * 6, mask=range(6)).describe()
    named = ", ".join(f"(0, {col}) 1" for col in range(6))
    assert f": {named}; they hold 21.0 % of" in line
    assert line.endswith(" in the last block; so many are no artifacts")
    (line,) = made([1.0] * 8, mask=range(8)).describe()
    assert f": {named} and 2 more; they hold" in line
    (line,) = made([1.0], mask=[]).describe()
    assert line == "no artifact tokens among 1 patches (norms after block 3)"
    lost = made([math.inf], mask=[0], threshold=math.nan)
    (line,) = dataclasses.replace(lost, from_cls=lost.from_cls * math.nan).describe()
    assert "a norm above ? after block 3: (0, 0) ?; they hold ? of CLS" in line


def test_each_block_runs_once(grafted):
    """And all before the last, whatever is asked: its attention is read of what they put out."""
    model, ran = CASE.build(grafted), []
    for i, block in enumerate(flat_blocks(model.blocks)):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    found = artifact_tokens(model, CASE.images)
    assert ran == [0, 1, 2, 3]
    assert_close(artifact_tokens(model, CASE.images, 0).from_all, found.from_all)
    assert ran == [0, 1, 2, 3] * 2


def test_of_layers_alike_the_first_is_taken(grafted):
    assert artifact_tokens(even(grafted), CASE.images).layer.tolist() == [1, 1]


def test_a_copy_on_the_cpu_is_the_same(grafted):
    found = artifact_tokens(CASE.build(grafted), CASE.images)
    copied = found.cpu()
    for field in dataclasses.fields(found):
        assert_same_bits(getattr(copied, field.name), getattr(found, field.name))
    assert found.layer.dtype == torch.int64


def test_neither_the_default_device_nor_the_default_dtype_is_asked(grafted):
    """All that is made is made where the tokens are: elsewhere it could not be joined to them.

    Of a square image, whose positions upstream, which does ask, has not to resize.
    """
    model, images = CASE.build(grafted), noise(2, 3, 8, 8, seed=1, dtype=torch.float64)
    found = artifact_tokens(model, images)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            again = artifact_tokens(model, images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(again.norms, found.norms)
    assert_close(again.from_all, found.from_all)


# Nothing is altered


@given(case=model_cases())
def test_weights_and_features_are_as_they_were(grafted, case):
    model = case.build(grafted)
    parameters = [parameter.clone() for parameter in model.parameters()]
    features, state = model(case.images), torch.get_rng_state()
    artifact_tokens(model, case.images)
    assert_same_bits(model(case.images), features)
    assert_same_bits(torch.get_rng_state(), state)
    assert_same_bits(parameters, list(model.parameters()))
    assert_nothing_on(model)


def test_recordings_around_it_see_nothing_of_it(grafted):
    model = build(grafted)
    with record(model, queries="cls") as maps:
        artifact_tokens(model, IMAGES)
        model(IMAGES)
    assert len(maps.passes) == 1


def test_an_error_inside_leaves_nothing_behind(grafted):
    def fail(*_):
        raise RuntimeError("no memory")

    model = build(grafted)
    hook = model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"), record(model, queries="cls"):
        artifact_tokens(model, IMAGES)
    hook.remove()
    assert_nothing_on(model)
    assert artifact_tokens(model, IMAGES).mask.shape == (2, 2, 3)


def test_nothing_is_differentiated(grafted):
    found = artifact_tokens(build(grafted), IMAGES.clone().requires_grad_())
    assert not found.norms.requires_grad
    assert not found.from_cls.requires_grad


def test_the_matrix_is_not_kept(grafted, monkeypatch):
    """Its rows are made a few at a time, whatever its size."""
    from dinov2_attn.maps import rollout, tiles

    sizes = []
    fused = rollout.Layer._fused

    def watched(*args):
        for lines, rows, part in fused(*args):
            sizes.append(rows.numel())
            yield lines, rows, part

    monkeypatch.setattr(rollout.Layer, "_fused", watched)
    monkeypatch.setattr(tiles, "TILE_BYTES", 2000)
    model = CASE.build(grafted)
    found = artifact_tokens(model, noise(1, 3, 40, 40, seed=1, dtype=torch.float64))
    assert 0 < max(sizes) <= 401  # one row at a time here
    assert 0 < found.from_all.sum() < 1


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((IMAGES, 3), OutOfRangeError, "blocks between -3 and 2"),
        ((IMAGES, True), InvalidInputError, "as whole numbers"),
        ((IMAGES[0],), InvalidInputError, r"\(B, C, H, W\)"),
        (([],), InvalidInputError, "a list of at least one tensor"),
        ((IMAGES[..., :3],), InvalidInputError, "multiples of the patch size"),
    ],
)
def test_what_cannot_be_is_an_error_before_anything_runs(grafted, arguments, error, message):
    with pytest.raises(error, match=message):
        artifact_tokens(build(grafted), *arguments)


# Last: it takes away the grafts of the tests above


def test_a_model_that_was_not_reached_says_the_same(first):
    found = artifact_tokens(build(first), IMAGES, 1)
    with dinov2_attn.install():
        expected = artifact_tokens(build(first), IMAGES, 1)
    assert_same_bits(found.mask, expected.mask)
    for name in ("norms", "threshold", "from_cls", "from_all"):
        assert_close(getattr(found, name), getattr(expected, name))
    assert dinov2_attn.ArtifactTokens.__name__ in dinov2_attn.__all__
