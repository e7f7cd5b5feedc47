"""The page as Python reads it: every number, what is left out, and what a title may hold."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import dinov2_attn
from dinov2_attn import AttentionMaps, attention_maps
from dinov2_attn.apps.explorer.assemble import at_least, embedded_json
from dinov2_attn.apps.explorer.budget import (
    KeptRows,
    Shape,
    cost,
    describe,
    everything,
    left_out,
    plan,
)
from dinov2_attn.apps.explorer.explore import explore
from dinov2_attn.apps.explorer.quantise import LEVELS, quantise
from dinov2_attn.apps.explorer.write import write_page
from dinov2_attn.apps.viz.images import LoadedImage
from dinov2_attn.apps.viz.text import NO_MEANING
from dinov2_attn.errors import InvalidInputError, OutOfRangeError, UnwritableOutputError
from dinov2_attn.math.selection import name_token
from tests.support import upstreams
from tests.support.pages import Page
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close

GRID, PREFIX, HEADS = (3, 5), 3, 2
N = PREFIX + 15
PICTURE = np.random.default_rng(0).integers(0, 255, (6, 10, 3), np.uint8)


def weights_of(seed, batch=1, heads=HEADS, rows=N, spread=3.0):
    logits = spread * noise(batch, heads, rows, N, seed=seed, dtype=torch.float64)
    return logits.softmax(-1)


def maps_of(layers=(0, 1, 4), queries=None, **options):
    rows = N if queries is None else len(queries)
    weights = tuple(weights_of(layer, rows=rows, **options) for layer in layers)
    return AttentionMaps(weights, layers, GRID, PREFIX, queries)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "page.html"


def written(path, maps, **options):
    said = write_page(path, PICTURE, maps, **options)
    assert said.size == path.stat().st_size
    return Page(path)


# 8 bits


@given(
    weights=arrays(np.float64, (2, 3, 7), elements=st.floats(0, 1, allow_subnormal=False, width=32))
)
def test_each_weight_gets_the_nearest_level_of_its_row(weights):
    table = quantise(torch.from_numpy(weights), (0, 1, 2))
    low, high = weights.min(-1, keepdims=True), weights.max(-1, keepdims=True)
    levels = low + (high - low) * (np.arange(256) / 255)[:, None, None, None] ** 3
    nearest = np.abs(levels - weights).min(0)
    off = np.abs(table.weights() - weights)
    assert_close(off, nearest, within=1e-15)
    assert table.error == pytest.approx(off.max(), rel=1e-12, abs=1e-15)


def test_small_weights_survive_beside_a_large_one():
    """Half of them would be zero in 256 even steps."""
    weights = weights_of(0, rows=40, spread=5.0)[0]
    off = (
        (torch.from_numpy(quantise(weights, tuple(range(40))).weights()) - weights) / weights
    ).abs()
    assert off.median() < 0.1
    assert weights.median() < weights.max() / 255 / 2
    assert LEVELS[0] == 0
    assert LEVELS[255] == 1


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(path, odd):
    maps = maps_of()
    maps.weights[1][0, 1, 2, 3] = odd
    with pytest.raises(InvalidInputError, match="NaN or infinity"):
        write_page(path, PICTURE, maps)
    assert not path.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_shown_as_what_they_hold(path, dtype):
    maps = maps_of(layers=(0,))
    maps = AttentionMaps((maps.weights[0].to(dtype),), (0,), GRID, PREFIX, None)
    page = written(path, maps)
    assert_shown(page, 0, "each", maps.weights[0][0].double())


@given(value=st.floats(0, 1))
def test_the_stated_error_is_not_below_the_measured_one(value):
    text = at_least(value)
    assert Decimal(text) >= Decimal(value)
    assert float(text) <= value * 1.1 + 1e-300


# What the page holds


def assert_shown(page, layer, kind, exact):
    """All rows of one layer, (heads, Q, N), for all of its queries."""
    kept = page.layer(layer)[kind]
    shown = np.stack(list(kept.values())).reshape(exact.shape)
    assert np.abs(shown - exact.numpy()).max() <= page.error
    assert list(kept) == [(h, q) for h in range(len(exact)) for q in range(exact.shape[1])]


@pytest.mark.parametrize("sample", [0, 1, -1])
def test_every_number_is_there_within_the_stated_error(path, sample):
    maps = maps_of(batch=2)
    page = written(path, maps, sample=sample)
    for layer, weights in zip(maps.layers, maps.weights, strict=True):
        assert set(page.layer(layer)) == {"each"}
        assert_shown(page, layer, "each", weights[sample])
    assert 0 < page.error < 0.01


def test_maps_of_the_mean_have_no_heads(path):
    maps = maps_of()
    means = tuple(weights.mean(1) for weights in maps.weights)
    page = written(path, AttentionMaps(means, maps.layers, GRID, PREFIX, None))
    assert page.about["heads"] == 0
    for layer, mean in zip(maps.layers, means, strict=True):
        assert set(page.layer(layer)) == {"mean"}
        assert_shown(page, layer, "mean", mean)


def test_some_rows_keep_their_tokens(path):
    maps = maps_of(queries=(7, 0, 17))
    page = written(path, maps)
    kept = page.layer(4)["each"]
    assert list(kept) == [(head, query) for head in (0, 1) for query in (7, 0, 17)]
    shown = np.stack(list(kept.values())).reshape(2, 3, N)
    assert np.abs(shown - maps.weights[2][0].numpy()).max() <= page.error
    assert page.about["token"] == 0


def test_numpy_arrays_will_do(path):
    maps = maps_of()
    assert_shown(written(path, maps.numpy()), 4, "each", maps.weights[2][0])


def test_outliers_are_positions_of_tokens(path):
    mask = torch.zeros(2, *GRID, dtype=torch.bool)
    mask[1, 2, 3] = mask[1, 0, 0] = True
    layer, threshold = torch.tensor([1, 8]), torch.tensor([9.0, 151.25])
    outliers = SimpleNamespace(mask=mask, threshold=threshold, layer=layer)
    page = written(path, maps_of(batch=2), outliers=outliers, sample=1)
    names = [name_token(token, PREFIX, GRID) for token in page.about["outliers"]]
    assert names == ["patch (0, 0)", "patch (2, 3)"]
    assert page.about["outliersFound"] == "(2: norm above 151.2 after layer 8)"


# What it leaves out

shapes = st.builds(
    lambda heads, registers, height, width, some: Shape(
        heads,
        tuple(range(0, 1 + registers + height * width, some)),
        1 + registers,
        (height, width),
    ),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 3),
)


def total(kept, shape):
    return sum(cost(keep, shape) for keep in kept.values())


@given(shape=shapes, count=st.integers(1, 5), share=st.floats(0, 1.2))
def test_what_is_kept_fits_and_grows_with_the_room(shape, count, share):
    layers = list(range(count))
    room = int(share * total(dict.fromkeys(layers, everything(shape)), shape))
    try:
        kept = plan(layers, shape, room)
    except InvalidInputError:
        assert room < cost(everything(shape), shape)
        return
    assert total(kept, shape) <= room
    assert kept[layers[-1]] != KeptRows()
    assert set().union(*(keep.queries for keep in kept.values())) <= set(shape.queries)
    if share >= 1:
        assert set(kept.values()) == {everything(shape)}
        assert left_out(kept, shape) == ""
    else:
        assert left_out(kept, shape)


@pytest.mark.parametrize("registers", [0, 4])
def test_vit_small_at_518_keeps_all_heads_of_its_last_layer_and_all_cls_rows(registers):
    shape = Shape(6, tuple(range(1 + registers + 37 * 37)), 1 + registers, (37, 37))
    kept = plan(list(range(12)), shape, 24_000_000)
    assert kept[11] == KeptRows(each=shape.queries)
    assert {kept[layer].mean for layer in (9, 10)} == {shape.queries}
    assert {kept[layer] for layer in range(8)} == {KeptRows(each=tuple(range(shape.prefix)))}
    told = describe(kept, shape)
    assert told.startswith("layer 11: all rows of each head; layers ")
    assert "all rows of the head mean, the row" in told
    rest = "the rows of CLS and registers" if registers else "the row of CLS"
    assert told.endswith(f": {rest} of each head")


@pytest.mark.parametrize("max_mb", [0.085, 0.1, 0.12, 0.13])
def test_the_page_is_no_larger_than_allowed_and_says_what_is_missing(path, max_mb):
    maps = maps_of(layers=tuple(range(12)), heads=12)
    said = write_page(path, PICTURE, maps, max_mb=max_mb)
    page = Page(path)
    assert 0.7 * max_mb * 1e6 < page.size <= max_mb * 1e6
    assert page.one("p", id="left-out")["text"] == said.left_out
    assert said.left_out.startswith(f"Left out to stay below {max_mb:g} MB: layer")
    enough = float(re.search(r"--max-mb (\d+) keeps everything", said.left_out)[1])
    whole = write_page(path, PICTURE, maps, max_mb=enough)
    assert whole.left_out == ""
    assert not Page(path).all("p", id="left-out")


def test_heads_give_way_to_their_mean(path):
    heads = 40
    maps = maps_of(layers=(3,), heads=heads)
    page = written(path, maps, max_mb=0.084)
    kept = page.layer(3)
    assert set(kept) == {"each", "mean"}
    assert_shown(page, 3, "mean", maps.weights[0][0].mean(0, keepdim=True))
    assert list(kept["each"]) == [(h, q) for h in range(heads) for q in range(PREFIX)]
    shown = np.stack(list(kept["each"].values())).reshape(heads, PREFIX, N)
    assert np.abs(shown - maps.weights[0][0, :, :PREFIX].numpy()).max() <= page.error
    assert "The mean of heads is stored if single heads are left out" in path.read_text("utf-8")


def test_a_size_that_nothing_fits_in_says_how_much_does(path):
    with pytest.raises(InvalidInputError, match="Raise --max-mb") as caught:
        write_page(path, PICTURE, maps_of(), max_mb=0.001)
    more = float(re.search(r"by ([\d.]+)", str(caught.value))[1])
    assert not path.exists()
    write_page(path, PICTURE, maps_of(), max_mb=0.001 + more + 0.001)


# Whatever a file is called

TITLES = [
    "<script>hacked = 1</script>.jpg",
    "</title></script><script>hacked = 1</script>",
    "\"><img src=x onerror=hacked=1> ' & &amp;.png",
    "</script><!-- <script>",
    "{{data}} {{tables}} {{policy}}",
    "猫 🐈 \u202e gpj.exe",
    "  ",
]


@pytest.mark.parametrize("title", TITLES)
def test_any_title_stays_a_title(path, title):
    page = written(path, maps_of(), title=title, model=title, warning=title)
    plain = written(path.parent / "plain.html", maps_of(), title="x", model="x", warning="x")
    safe = title.replace("\u202e", r"\u202e")
    assert page.one("title")["text"] == f"{safe} · attention"
    assert page.one("bdi")["text"] == safe
    assert page.one("p", id="warning")["text"] == safe
    assert [e["tag"] for e in page.elements] == [e["tag"] for e in plain.elements]


def test_a_name_that_is_no_text_is_shown_as_far_as_it_is(path):
    page = written(path, maps_of(), title="cat\udcff.jpg")
    assert page.one("bdi")["text"] == r"cat\udcff.jpg"


def test_nothing_is_fetched_and_nothing_but_the_pages_own_script_runs(path):
    page = written(path, maps_of(), title="http")
    text = path.read_text("utf-8")
    assert not re.search(r"\b(https?|ftp|wss?):|//\w+\.\w", text)
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"})["content"]
    script, style = page.one("script", type="module")["text"], page.one("style")["text"]
    for kind, content in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    executable = [e for e in page.all("script") if e.get("type") == "module"]
    assert len(executable) == 1
    addresses = [e.get("src") or e.get("href") for e in page.elements]
    assert all(address.startswith("data:") for address in filter(None, addresses))


def test_no_text_ends_the_element_that_holds_the_json():
    hostile = {"</script>": ["<!--", "<script>", "\u2028]]>"]}
    text = embedded_json(hostile)
    assert "<" not in text
    assert json.loads(text) == hostile


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_mb": 0}, "max_mb above 0"),
        ({"max_mb": float("nan")}, "max_mb above 0"),
        ({"picture": PICTURE[:5]}, r"whole patches of a grid \(3, 5\)"),
        ({"picture": PICTURE / 255}, "Found float64"),
        ({"picture": PICTURE[..., 0]}, r"Found uint8 \(6, 10\)"),
    ],
)
def test_bad_arguments_are_explained(path, change, message):
    arguments = {"picture": PICTURE, "maps": maps_of(), **change}
    with pytest.raises(InvalidInputError, match=message):
        write_page(path, **arguments)
    assert not path.exists()


def test_maps_that_no_page_can_show_are_refused(path):
    with pytest.raises(InvalidInputError, match=r"a list of 1\.\n.*maps\[0\]"):
        write_page(path, PICTURE, [maps_of()])
    with pytest.raises(InvalidInputError, match="no layer"):
        write_page(path, PICTURE, AttentionMaps((), (), GRID, PREFIX))
    uneven = AttentionMaps((weights_of(0), weights_of(0, heads=3)), (0, 1), GRID, PREFIX)
    with pytest.raises(InvalidInputError, match="one shape in every layer"):
        write_page(path, PICTURE, uneven)
    with pytest.raises(InvalidInputError, match="3 \\+ 5 · 5 = 28 columns"):
        write_page(path, PICTURE, AttentionMaps((weights_of(0),), (0,), (5, 5), PREFIX))
    with pytest.raises(OutOfRangeError, match="a sample between 0 and 0.\nFound 1"):
        write_page(path, PICTURE, maps_of(), sample=1)


@pytest.mark.parametrize("name", [".", "..", "folder"])
def test_an_output_that_is_a_folder_is_an_error(tmp_path, name):
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UnwritableOutputError):
        write_page(tmp_path / name, PICTURE, maps_of())
    assert sorted(tmp_path.rglob("*")) == before


# From a model


@pytest.fixture(scope="module", params=[upstreams.FIRST, upstreams.DEPTH_ANYTHING], ids=str)
def model(request):
    """The first upstream without registers, and a fork with two of them."""
    upstream = request.param
    registers = {"num_register_tokens": 2} if upstream.has_registers else {}
    built = upstream.cls("DinoVisionTransformer")(
        img_size=8, patch_size=2, embed_dim=12, num_heads=3, depth=4, block_chunks=0, **registers
    )
    with dinov2_attn.install(upstream.package):
        yield randomise(built, 1)


@pytest.fixture
def image():
    return LoadedImage(noise(3, 6, 10, seed=3), PICTURE)


@pytest.mark.parametrize("n", [None, [1, -1], 2])
@pytest.mark.parametrize("heads", [None, "mean"])
def test_a_model_is_explored_as_its_maps_are_written(model, image, tmp_path, n, heads):
    with torch.inference_mode():
        maps = attention_maps(model, image.tensor[None], n, heads=heads)
    explore(model, image, tmp_path / "a.html", n, heads=heads)
    write_page(tmp_path / "b.html", PICTURE, maps)
    ours, theirs = Page(tmp_path / "a.html"), Page(tmp_path / "b.html")
    assert [one["layer"] for one in ours.about["layers"]] == list(maps.layers)
    if heads:
        assert ours.about["layers"] == theirs.about["layers"]
    else:  # as queries and keys, which are smaller
        assert all(one["coded"] for one in ours.about["layers"])
        assert ours.error < theirs.error
    for layer, weights in zip(maps.layers, maps.weights, strict=True):
        exact = weights[0] if heads is None else weights
        assert_shown(ours, layer, "mean" if heads else "each", exact.double())


def test_a_model_is_asked_for_no_more_rows_than_there_is_room_for(model, image, path, monkeypatch):
    asked = {}

    def spy(model, layers, **options):
        asked.update(dict.fromkeys(layers, options["queries"]))
        return dinov2_attn.record(model, layers, **options)

    monkeypatch.setattr("dinov2_attn.apps.explorer.asked.record", spy)
    said = explore(model, image, path, heads="mean")
    assert said.left_out == ""
    assert {len(queries) for queries in asked.values()} == {Page(path).tokens}

    # Not enough: 3000 bytes are reserved for sentences.
    said = explore(model, image, path, heads="mean", max_mb=(said.size + 1500) / 1e6)
    assert "all other rows" in said.left_out
    page = Page(path)
    assert 1 <= len([queries for queries in asked.values() if len(queries) < page.tokens]) <= 4
    with torch.inference_mode():
        maps = attention_maps(model, image.tensor[None], heads="mean")
    for layer, weights in zip(maps.layers, maps.weights, strict=True):
        for (_, query), row in page.layer(layer)["mean"].items():
            assert query in asked[layer]
            assert np.abs(row - weights[0, query].double().numpy()).max() <= page.error


def test_random_weights_are_announced(model, image, path):
    explore(model, image, path, warning=NO_MEANING)
    assert Page(path).one("p", id="warning")["text"] == NO_MEANING


def test_a_model_that_cannot_be_run_here_is_an_error_of_ours(model, image, path):
    def run_out(*_):
        raise RuntimeError("not enough memory\nand a page of advice")

    hook = model.blocks[0].register_forward_pre_hook(run_out)
    try:
        with pytest.raises(
            InvalidInputError, match=r"6 × 10 \(RuntimeError: not enough memory\)\.\nGive"
        ):
            explore(model, image, path)
    finally:
        hook.remove()
    assert not path.exists()
