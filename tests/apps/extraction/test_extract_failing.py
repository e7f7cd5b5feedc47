"""A pass that fails is one image that fails: the others have their maps, and commands say why."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_attn import AttentionDataset, extract
from dinov2_attn.apps.extraction import inference as batches
from dinov2_attn.apps.viz import inference
from dinov2_attn.errors import (
    InvalidInputError,
    NotGraftedError,
    UnavailableError,
    UnreadableFileError,
)
from tests.support.extraction import build, draw, files_of, index_of, photographs, stored
from tests.support.tolerances import assert_close

ERRORS = {
    "RuntimeError": RuntimeError("no kernel for this"),
    "AssertionError": AssertionError(),
    "ValueError": ValueError("no, for\nseveral reasons"),
    "KeyError": KeyError("x"),
    "StopIteration": StopIteration("here"),
    "MemoryError": MemoryError(),
    "OutOfMemoryError": torch.cuda.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 9 GiB"
    ),
    "OSError": OSError(5, "a hook that reads"),
}


@pytest.fixture(scope="module")
def model(grafted):
    return build(grafted)


@pytest.fixture
def images(tmp_path):
    """Twelve images of one size, so that they run together."""
    for i in range(12):
        draw(tmp_path / "in" / f"{i:02}.png", (6, 4), i)
    return tmp_path / "in"


def bright(images):
    """Return whether the white image is among ``images``."""
    return bool((images.flatten(1).min(1).values > 2).any())


@pytest.fixture
def failing(model, images):
    """A model with a hook of the user's that raises for the white image, number 5."""
    Image.fromarray(np.full((6, 4, 3), 255, dtype=np.uint8)).save(images / "05.png")
    raised = [RuntimeError("white")]

    def hook(_, inputs):
        if raised and bright(inputs[0]):
            raise raised[0]

    handle = model.patch_embed.register_forward_pre_hook(hook)
    yield raised
    handle.remove()


@pytest.mark.parametrize("artifacts", [False, True])
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_one_image_concerns_this_image_only(
    model, images, failing, tmp_path, name, artifacts
):
    failing[0] = ERRORS[name]
    done = extract(
        model, images, tmp_path / "out", batch_size=8, shard_size=10, artifacts=artifacts
    )
    assert (done.images, done.unreadable, done.failed) == (12, 1, 1)
    (line,) = index_of(tmp_path / "out", "unreadable.jsonl")
    assert (line["number"], line["path"], line["stage"]) == (5, "05.png", "pass")
    assert f"found 05.png, of which it sees 6 × 4 pixels ({name}" in line["reason"]
    assert "GPU" not in line["reason"]
    assert "\n" not in line["reason"]
    assert "1 of them unreadable (1 in its pass through the model)" in str(done)
    assert len(AttentionDataset(tmp_path / "out")) == 11
    for _, maps, prefix in stored(tmp_path / "out"):
        assert_close(maps.sum((-2, -1)) + prefix.sum(-1), torch.ones(maps.shape[:-2]), size=1.0)


def test_the_others_have_the_maps_they_have_without_it(model, images, failing, tmp_path):
    extract(model, images, tmp_path / "failing")
    failing.clear()
    extract(model, images, tmp_path / "whole")
    whole = {entry["path"]: maps for entry, maps, _ in stored(tmp_path / "whole")}
    assert len(whole) == 12
    for entry, maps, _ in stored(tmp_path / "failing"):
        assert_close(maps, whole[entry["path"]], size=1.0)


def test_the_bytes_are_the_same_in_every_run_and_after_a_stop(model, images, failing, tmp_path):
    failing[0] = RuntimeError("object at 0x7f00dead, and white")
    options = {"batch_size": 3, "shard_size": 4}
    extract(model, images, tmp_path / "one", **options)
    failing[0] = RuntimeError("object at 0x7f00beef, and white")
    extract(model, images, tmp_path / "two", **options)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    for name in ("shards/00001.jsonl", "shards/00002.safetensors", "index.jsonl"):
        (tmp_path / "two" / name).unlink()
    assert extract(model, images, tmp_path / "two", **options).written == 2
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_what_failed_is_passed_over_until_it_is_tried_again(model, images, failing, tmp_path):
    options = {"batch_size": 3, "shard_size": 4}
    extract(model, images, tmp_path / "out", **options)
    failing.clear()
    again = extract(model, images, tmp_path / "out", **options)
    assert (again.seen, again.unreadable, again.failed) == (0, 1, 1)
    tried = extract(model, images, tmp_path / "out", retry=True, **options)
    assert (tried.written, tried.unreadable, tried.failed) == (1, 0, 0)
    extract(model, images, tmp_path / "again", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")


def test_both_stages_are_listed(model, images, failing, tmp_path):
    (images / "broken.png").write_bytes(b"no image")
    done = extract(model, images, tmp_path / "out")
    assert (done.unreadable, done.failed) == (2, 1)
    lines = index_of(tmp_path / "out", "unreadable.jsonl")
    assert [(e["path"], e["stage"]) for e in lines] == [
        ("05.png", "pass"),
        ("broken.png", "decode"),
    ]
    assert AttentionDataset(tmp_path / "out").unreadable() == lines


def test_strict_stops_at_the_first_and_names_it(model, images, failing, tmp_path):
    with pytest.raises(
        UnreadableFileError, match=r"(?s)is strict\.\nFound .*05\.png, .*RuntimeError: white"
    ):
        extract(model, images, tmp_path / "out", strict=True)
    assert not (tmp_path / "out" / "index.jsonl").exists()
    extract(model, images, tmp_path / "out")
    with pytest.raises(
        UnreadableFileError, match=r"(?s)is strict\.\nFound .*05\.png, .*RuntimeError: white"
    ):
        extract(model, images, tmp_path / "out", strict=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_stops_the_run_stops_it(model, images, failing, tmp_path, error):
    failing[0] = error()
    with pytest.raises(error):
        extract(model, images, tmp_path / "out")
    assert not (tmp_path / "out" / "index.jsonl").exists()
    failing[0] = RuntimeError("white")
    assert extract(model, images, tmp_path / "out").unreadable == 1


def test_images_that_only_fail_together_are_run_alone(model, images, tmp_path):
    def hook(_, inputs):
        if len(inputs[0]) > 1:
            raise RuntimeError("one at a time")

    with model.patch_embed.register_forward_pre_hook(hook):
        assert extract(model, images, tmp_path / "out").unreadable == 0


def test_a_model_that_is_grafted_no_more_stops_the_run(model, images, tmp_path, monkeypatch):
    def gone(*_):
        raise NotGraftedError("a graft", "none", "Install it.")

    monkeypatch.setattr(batches, "_attend", gone)
    with pytest.raises(NotGraftedError):
        extract(model, images, tmp_path / "out")


def test_a_device_that_is_gone_stops_the_run(monkeypatch):
    """After an assertion on a GPU every later call fails, of whatever image."""

    def gone(*_, **__):
        raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors …")

    monkeypatch.setattr(inference.torch, "zeros", gone)
    with pytest.raises(UnavailableError, match="(?s)device-side assert triggered\\.\n.*run again"):
        inference.check_alive(torch.device("cuda"))
    inference.check_alive(torch.device("cpu"))


def test_weights_that_are_no_numbers_have_maps_that_are_none(grafted, images, tmp_path):
    """Nothing is raised, and ``prefix_mass`` says it."""
    model = build(grafted)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
        model.blocks[2].attn.qkv.weight.fill_(float("nan"))
    assert extract(model, images, tmp_path / "out", artifacts=True).unreadable == 0
    assert all(entry["prefix_mass"] == [None] for entry, *_ in stored(tmp_path / "out"))


def test_an_image_that_needs_too_much_memory(model, tmp_path, monkeypatch):
    """Decoding that finds no memory is a reason too."""
    from dinov2_attn.apps.extraction import decode

    photographs(tmp_path / "in", 6)
    fit = decode.fit

    def large(image, *rest):
        if image.shape[:2] == (4, 10):
            raise MemoryError
        return fit(image, *rest)

    monkeypatch.setattr(decode, "fit", large)
    done = extract(model, tmp_path / "in", tmp_path / "out")
    assert (done.unreadable, done.failed) == (1, 0)
    (line,) = index_of(tmp_path / "out", "unreadable.jsonl")
    assert line["stage"] == "decode"
    assert "(MemoryError)" in line["reason"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, InvalidInputError("a", "b", "c.")]
)
def test_inference_on_lets_pass_what_is_not_of_the_image(error):
    with (
        pytest.raises(error if isinstance(error, type) else InvalidInputError),
        inference.inference_on(torch.zeros(1, 3, 2, 2)),
    ):
        raise error


def test_inference_on_advises_a_smaller_image_for_memory_only():
    for error, advice in (
        (MemoryError(), "smaller --image-size"),
        (ValueError("x"), "Leave it out"),
    ):
        with (
            pytest.raises(InvalidInputError, match=advice),
            inference.inference_on(torch.zeros(1, 3, 2, 2)),
        ):
            raise error


def test_refusals_are_plain_json(model, images, failing, tmp_path):
    failing[0] = ValueError("caf\udce9 \x00 é")
    extract(model, images, tmp_path / "out")
    text = (tmp_path / "out" / "unreadable.jsonl").read_text(encoding="ascii")
    assert "caf\\udce9" in json.loads(text)["reason"]
