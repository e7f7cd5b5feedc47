"""Statistics of models are those of the explicit matrices of their own pass."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given
from torch import nn

import dinov2_attn
from dinov2_attn import Statistics, edit, record, statistics
from dinov2_attn.errors import InvalidInputError, NotRecordedError, OutOfRangeError
from dinov2_attn.maps import measuring
from tests.maps.test_gradients import MODELS, Explicit, of_dinov3, of_fork, of_upstream
from tests.maps.test_measuring import Largest
from tests.support import dinov3, layouts, upstreams
from tests.support.explicit import Eager
from tests.support.recordings import IMAGES, assert_nothing_on, build
from tests.support.statistics import ALL, assert_statistics, places_of
from tests.support.statistics import statistics as defined
from tests.support.strategies import ModelCase, model_cases, noise
from tests.support.tolerances import assert_close, assert_same_bits
from tests.support.xformers_visibility import quiet


@torch.no_grad()
def truth(model, images, places, run=None):
    """Statistics of each layer, of the matrices of explicit attention."""
    with Eager() as eager:
        (run or model)(images)
    return [defined(weights, places) for weights in eager.weights]


def assert_are(found, expected):
    __tracebackhide__ = True
    assert len(found.layers) == len(expected) > 0
    for i, layer in enumerate(expected):
        assert_statistics({name: found[name][i] for name in found}, layer)


@pytest.mark.parametrize("kind", MODELS)
def test_they_are_those_of_the_matrices_of_the_pass(kind):
    model, images = MODELS[kind]()
    found = statistics(model, images)
    places = places_of(found.prefix, found.grid)
    assert_are(found, truth(model, images, places))
    assert list(found) == list(ALL)
    assert not any(one.requires_grad for name in found for one in found[name])
    assert_nothing_on(model)


# The four tokens of this model's second layer move as those of a grid would.
@example(case=ModelCase(2, 0, 0, 1, (3, 1), 1, torch.float32, 20366))
@given(case=model_cases())
def test_any_size_of_a_grafted_model(models, case):
    model = case.build(models)
    found = statistics(model, case.images, masks=case.masks)
    places = places_of(case.prefix(models), case.grid)
    run = partial(model.forward_features, masks=case.masks)
    assert_are(found, truth(model, case.images, places, run))
    assert (found.grid, found.prefix) == (case.grid, case.prefix(models))


@torch.no_grad()
def test_a_recording_has_the_same_beside_its_weights():
    model, images = of_fork()
    plain, alone = model(images), statistics(model, images)
    with record(model, statistics=ALL, queries="cls") as maps:
        features = model(images)
    assert_same_bits(features, plain)
    assert maps.weights[0].shape[2] == 1
    for name in ALL:
        assert_same_bits(maps.statistics[name], alone[name])
    assert maps.statistics.grid == maps.grid
    assert maps.statistics.prefix == maps.prefix


@torch.no_grad()
def test_no_weights_need_be_kept():
    model, images = of_fork()
    with record(model, statistics="entropy", queries=[], reduce=lambda layer, w: w.shape) as maps:
        model(images)
    assert maps.weights[0] == (2, 2, 0, 7)
    assert_are(maps.statistics, truth(model, images, places_of(1, (2, 3))))


def test_layers_and_heads_may_be_chosen():
    model, images = of_fork()
    whole = statistics(model, images)
    last = statistics(model, images, "entropy", layers=[-1])
    assert last.layers == (2,)
    assert_same_bits(last["entropy"][0], whole["entropy"][2])
    mean = statistics(model, images, heads="mean")
    with torch.no_grad(), Eager() as eager:
        model(images)
    places = places_of(whole.prefix, whole.grid)
    assert_are(mean, [defined(weights.mean(1), places) for weights in eager.weights])


def test_a_list_of_batches_has_a_list_of_statistics():
    model, images = of_upstream()
    batches = [images, images[:1, :, :2, :4]]
    for own, one in zip(batches, statistics(model, batches, ("distance", "received")), strict=True):
        alone = statistics(model, own, ("distance", "received"))
        assert one.grid == alone.grid == (own.shape[2] // 2, own.shape[3] // 2)
        for name in alone:
            assert_same_bits(one[name], alone[name])


@quiet
@torch.no_grad()
def test_a_nested_list_has_those_of_each_batch(nested):
    if nested.name == "moge":
        pytest.skip("its forward_features takes no lists; upstream's does")
    attention = nested.cls("MemEffAttention")
    model = build(nested, block_fn=partial(nested.cls("NestedTensorBlock"), attn_class=attention))
    batches = [IMAGES, IMAGES[:1, :, :2, :4] * 2]
    with record(model, statistics=ALL, queries=[]) as maps:
        model.forward_features(batches, [None, None])
    for images, ours in zip(batches, maps, strict=True):
        grid = images.shape[2] // 2, images.shape[3] // 2
        assert ours.statistics.grid == grid
        run = model.forward_features
        assert_are(ours.statistics, truth(model, images, places_of(1, grid), run))


@torch.no_grad()
def test_a_list_of_dinov3_has_those_of_each_batch():
    model, images = of_dinov3()
    crops = dinov3.CROPS.double()
    with record(model, statistics=ALL, queries=[]) as maps:
        model.forward_features([images, crops], [None, None])
    for one, own in zip((images, crops), maps, strict=True):
        found = own.statistics
        assert_are(found, truth(model, one, places_of(found.prefix, found.grid)))


def test_registers_behind_the_patches_are_no_patches():
    upstream = upstreams.FIRST
    model = layouts.build(upstream, layouts.registers_behind(upstream, 2), dtype=torch.float64)
    images = noise(1, 3, 6, 8, seed=0, dtype=torch.float64)
    found = statistics(model, images)
    assert (found.prefix, found.suffix, found.grid) == (1, 2, (3, 4))
    assert_are(found, truth(model, images, places_of(1, (3, 4), 2)))


@pytest.mark.parametrize("planes", [False, True])
def test_tokens_of_one_cell_have_its_place(planes):
    upstream = upstreams.FIRST
    base = layouts.several_per_cell(upstream, 2, planes=planes, prefix=1)
    model = layouts.build(upstream, base, dtype=torch.float64)
    images = noise(1, 3, 8, 8, seed=0, dtype=torch.float64)
    found = statistics(model, images)
    assert (found.per_cell, found.planes) == (2, planes)
    assert_are(found, truth(model, images, places_of(1, (4, 4), 0, 2, planes)))
    assert found.patch_maps("entropy")[0].shape == (1, 2, 2, 4, 4)
    assert found.patch_maps("centroid")[0].shape == (1, 2, 2, 4, 4, 2)


def test_windows_have_grids_of_their_own():
    upstream = upstreams.FIRST
    base = layouts.windowed(upstream, (2, 2), (2, 2))
    model = layouts.build(upstream, base, dtype=torch.float64)
    images = noise(1, 3, 8, 8, seed=0, dtype=torch.float64)
    found = statistics(model, images)
    assert found.grid == (2, 2)
    assert found["distance"][0].shape == (4, 2, 5)
    assert_are(found, truth(model, images, places_of(1, (2, 2))))


def test_edited_weights_are_measured():
    model, images = of_fork()
    plain = statistics(model, images)
    with edit(model, heads={1: [0]}):
        found = statistics(model, images)
    for name in ("entropy", "received", "prefix_mass"):
        assert not found[name][1][:, 0].any()
    assert found["distance"][1][:, 0].isnan().all()
    assert_same_bits(found["entropy"][0], plain["entropy"][0])
    assert_nothing_on(model)


def test_hidden_keys_receive_nothing():
    model, images = of_fork()
    with edit(model, [0], keys=[3]), record(model, statistics=ALL) as maps:
        model(images)
    assert not maps.statistics["received"][0][..., 3].any()
    weights = maps.weights[0].detach()
    places = places_of(maps.prefix, maps.grid)
    assert_statistics({n: maps.statistics[n][0] for n in ALL}, defined(weights, places))


def test_training_inference_and_grad_modes_make_no_difference():
    model, images = of_fork()
    plain = statistics(model, images)
    with torch.inference_mode():
        inference = statistics(model, images)
    with record(model, statistics=ALL, gradients=True, queries="cls") as maps:
        model(images).sum().backward()
    model.train()
    for other in (inference, maps.statistics, statistics(model, images)):
        for name in ALL:
            assert_same_bits(other[name], plain[name])


def test_weights_before_dropout_are_measured():
    model = nn.Sequential(Explicit("dropout"))
    tokens = noise(2, 5, 8, seed=0)
    with record(model.train(), statistics=("entropy", "received")) as maps:
        model(tokens)
    assert_close(maps.statistics["received"][0].sum(-1), torch.ones(2, 2))
    matrix = maps.weights[0].detach()
    assert_statistics(
        {name: maps.statistics[name][0] for name in ("entropy", "received")},
        defined(matrix, [None] * 5),
    )


def test_a_batch_of_no_images_has_no_numbers():
    model, images = of_upstream()
    with record(model, statistics=ALL, grid=(2, 3), prefix=1) as maps:
        model(images[:0])
    assert maps.statistics["distance"][0].shape == (0, 2, 7)


def test_autocast_measures_what_the_kernel_was_given():
    model, images = of_dinov3()
    model, images = model.float(), images.float()
    with torch.autocast("cpu", torch.bfloat16), record(model, statistics=ALL) as maps:
        model(images)
    for name in ALL:
        assert {one.dtype for one in maps.statistics[name]} == {torch.float32}
    expected = defined(maps.weights[0].detach(), places_of(maps.prefix, maps.grid))
    ours = {name: maps.statistics[name][0] for name in ALL}
    assert_statistics(ours, expected, dtype=torch.bfloat16)


def test_copies_and_files_hold_them(tmp_path):
    pytest.importorskip("safetensors")
    model, images = of_fork()
    found = statistics(model, images)
    found.save(tmp_path / "found.safetensors")
    read = Statistics.load(tmp_path / "found.safetensors")
    assert_same_bits(dict(read.values), dict(found.values))
    assert (read.grid, read.layers, repr(read)) == (found.grid, found.layers, repr(found))
    with torch.no_grad(), record(model, statistics=("spread", "entropy")) as maps:
        model(images)
    maps.save(tmp_path / "maps.safetensors")
    restored = dinov2_attn.AttentionMaps.load(tmp_path / "maps.safetensors").statistics
    assert_same_bits(restored["spread"], maps.statistics["spread"])
    assert "statistics=spread, entropy" in repr(maps)


def test_layers_that_are_paths_are_saved_too(tmp_path):
    pytest.importorskip("safetensors")
    layers = ("encoder.layer.0.attention", "encoder.layer.1.attention")
    values = {name: (torch.ones(1, 2, 7), torch.zeros(1, 2, 7)) for name in ("entropy", "spread")}
    found = Statistics(values, layers, (2, 3), 1)
    found.save(tmp_path / "found.safetensors")
    read = Statistics.load(tmp_path / "found.safetensors")
    assert read.layers == layers
    assert_same_bits(dict(read.values), values)


def test_tokens_behind_the_patches_are_in_its_line():
    found = Statistics({"entropy": (torch.zeros(1, 2, 9),)}, (3,), (2, 3), 1, 2)
    facts = "statistics=entropy, layers=3, values=(1, 2, 9), grid=2×3, prefix=1"
    assert repr(found) == f"Statistics({facts}, suffix=2)"
    assert repr(Statistics(found.values, (3,), (2, 3), 1)) == f"Statistics({facts})"


def test_arrays_and_maps_have_the_same_numbers():
    model, images = of_fork()
    found = statistics(model, images)
    arrays = found.numpy()
    for name in ALL:
        assert isinstance(arrays[name][0], np.ndarray)
        assert_same_bits(arrays.patch_maps(name)[0], found.patch_maps(name)[0].numpy())
    assert_same_bits(arrays.by_head("distance"), found.by_head("distance").numpy())
    assert_same_bits(found.cpu()["entropy"], found["entropy"])
    assert_same_bits(found.patch_maps("entropy")[1].flatten(-2), found["entropy"][1][..., 1:])
    assert found.patch_maps("centroid")[0].shape == (2, 2, 2, 3, 2)
    assert found != arrays
    assert (len(found), "entropy" in found, "entropies" in found, 3 in found) == (
        6,
        True,
        False,
        False,
    )


def test_means_by_head_are_over_queries_with_a_number():
    model, images = of_fork()
    found = statistics(model, images)
    distance = torch.stack(found["distance"])
    assert_close(found.by_head("distance"), distance[..., 1:].mean(-1))
    assert_close(found.by_head("distance", queries=None), distance[..., 1:].mean(-1))
    assert_close(found.by_head("entropy", "cls"), torch.stack(found["entropy"])[..., 0])
    assert_close(found.by_head("entropy", [2, 3]), torch.stack(found["entropy"])[..., 2:4].mean(-1))
    assert found.by_head("received").shape == (3, 2, 2)


class Stages(nn.Module):
    """Two layers with other numbers of windows, as stages of Swin have them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Explicit("plain"), Explicit("plain")])

    def forward(self, x):
        x = self.layers[0](x)
        return self.layers[1](x[:1])


def test_layers_of_other_shapes_have_no_common_tensor_of_means():
    model, tokens = Stages(), noise(2, 5, 8, seed=0)
    with record(model, statistics="entropy", grid=(2, 2), prefix=1) as maps:
        model(tokens)
    found = maps.statistics
    assert [tuple(one.shape) for one in found["entropy"]] == [(2, 2, 5), (1, 2, 5)]
    for queries in ("patches", None):
        with pytest.raises(InvalidInputError, match=r"layers of \(2, 2\) and \(1, 2\)"):
            found.by_head("entropy", queries)
    assert_nothing_on(model)


def test_queries_that_are_other_tokens_have_no_names():
    layout = {"layers": (0,), "grid": (2, 2), "prefix": 1}
    values = {"entropy": (noise(2, 2, 3, seed=0),), "received": (noise(2, 2, 5, seed=1),)}
    found = Statistics(values, **layout)
    with pytest.raises(InvalidInputError, match="3 queries, which are other tokens"):
        found.by_head("entropy")
    assert_close(found.by_head("entropy", None)[0], values["entropy"][0].mean(-1))
    assert_close(found.by_head("received")[0], values["received"][0][..., 1:].mean(-1))


def test_what_cannot_be_is_refused():
    model, images = of_fork()
    found = statistics(model, images, ("entropy", "centroid"))
    with pytest.raises(InvalidInputError, match="'distance'"):
        found["distance"]
    with pytest.raises(InvalidInputError, match="a row and a column"):
        found.by_head("centroid")
    with pytest.raises(OutOfRangeError, match="7 tokens"):
        found.by_head("entropy", 7)
    with pytest.raises(InvalidInputError, match="at least one statistic"):
        statistics(model, images, ())
    with pytest.raises(InvalidInputError, match="each once"):
        statistics(model, images, "entropies")
    with pytest.raises(InvalidInputError, match='"mean"'):
        statistics(model, images, heads=[0])
    with pytest.raises(OutOfRangeError, match="blocks between"):
        statistics(model, images, layers=[7])
    with torch.no_grad(), record(model) as maps:
        model(images)
    with pytest.raises(InvalidInputError, match="statistics="):
        _ = maps.statistics
    with pytest.raises(InvalidInputError, match="each once"), record(model, statistics=("a",)):
        pass
    assert_nothing_on(model)


def test_tokens_without_a_grid_have_entropy():
    model, tokens = nn.Sequential(Explicit("plain")), noise(2, 5, 8, seed=0)
    with record(model, statistics=("entropy", "received")) as maps:
        model(tokens)
    found = maps.statistics
    assert_close(found.by_head("entropy", queries=None), found["entropy"][0].mean(-1)[None])
    with pytest.raises(InvalidInputError, match="queries=None"):
        found.by_head("entropy")
    with pytest.raises(InvalidInputError, match="grid=.*prefix="):
        found.patch_maps("entropy")
    with (
        pytest.raises(InvalidInputError, match='"entropy" and "received"'),
        record(model, statistics="distance"),
    ):
        model(tokens)
    assert_nothing_on(model)
    with record(model, statistics="distance", grid=(2, 2), prefix=1) as maps:
        model(tokens)
    assert maps.statistics["distance"][0].shape == (2, 2, 5)


def test_transforms_are_refused():
    model, images = of_fork()

    def ask(one):
        return statistics(model, one, "entropy")["entropy"][0]

    with pytest.raises(NotRecordedError, match=r"torch\.func"):
        torch.func.vmap(ask)(images[None])
    assert_nothing_on(model)


def test_stochastic_depth_in_training_is_refused():
    model, images = of_upstream(drop_path_rate=0.3)
    model.train()
    if not any(getattr(m, "sample_drop_ratio", 0) for m in model.modules()):
        pytest.skip("this revision drops no samples")
    with pytest.raises(InvalidInputError, match=r"model\.eval\(\)"):
        statistics(model, images)


class Collecting(nn.Module):
    """A model that keeps features in a list, and reads them when its backbone has run."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.features = backbone, []
        backbone.norm.register_forward_hook(lambda *_: self.features.append("norm"))

    def forward(self, images):
        self.features = [images.mean()]
        self.features.append(images.std())
        output = self.backbone(images)
        return output * self.features[-2] + len(self.features)


def test_a_model_that_collects_features_in_a_list_collects_none_of_the_probe(first):
    model = Collecting(build(first))
    model.backbone.blocks[0].register_forward_hook(lambda *_: model.features.append(0))
    plain = model(IMAGES)
    collected = len(model.features)
    with record(model, [1], statistics="distance", queries=[]):
        assert_same_bits(model(IMAGES), plain)
    assert len(model.features) == collected


@torch.no_grad()
def test_an_image_that_was_embedded_alone_before_says_nothing_of_the_grid():
    """Both have as many patches, and other grids."""
    model, high = of_upstream()
    wide = high.transpose(-1, -2)
    expected = statistics(model, wide, "distance")["distance"]
    with record(model, statistics="distance", queries="cls") as maps:
        model.patch_embed(high)
        model(wide)
        model(high)
        model(wide)
    for one in (maps[0], maps[2]):
        assert one.grid == (3, 2)
        for found, wanted in zip(one.statistics["distance"], expected, strict=True):
            assert_same_bits(found[..., one.prefix :], wanted[..., one.prefix :])


class Fused(nn.Module):
    """A module that calls PyTorch's kernel."""

    num_heads = 2

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_no_matrix_is_made(monkeypatch):
    monkeypatch.setattr(measuring, "TILE_BYTES", 2**16)
    model, tokens = nn.Sequential(Fused()), noise(1, 901, 32, seed=0)
    with record(model, statistics=ALL, queries=[], grid=(30, 30), prefix=1) as maps:
        model(tokens)  # proves
        with Largest() as largest:
            model(tokens)
    assert largest.size < 4 * 901**2 / 4
    assert_same_bits(maps[0].statistics["spread"], maps[1].statistics["spread"])
