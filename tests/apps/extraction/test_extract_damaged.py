"""Files of an extraction that were changed after it: a second run finds and replaces them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov2_attn import extract
from tests.support.extraction import build, files_of, photographs

OPTIONS = {"shard_size": 3, "artifacts": True}


@pytest.fixture(scope="module")
def model(grafted):
    return build(grafted)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = photographs(tmp_path_factory.mktemp("images") / "in", 7)
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def whole(model, images, tmp_path_factory):
    """A finished extraction, its folder and the bytes of its files."""
    out = tmp_path_factory.mktemp("whole") / "out"
    extract(model, images, out, **OPTIONS)
    return out, files_of(out)


def assert_restored(model, images, whole, **options):
    out, expected = whole
    done = extract(model, images, out, **OPTIONS, **options)
    found = files_of(out)
    for name, content in expected.items():  # restored for the next test, whatever this one says
        (out / name).write_bytes(content)
    assert found == expected
    return done


STRAY = [
    "{}",
    '{"number": 9}',
    "null",
    "[]",
    "3",
    "no JSON",
    '{"number": 0, "source": "in", "path": "x", "stage": "decode", "reason": "none"}',
    "",
    "\x00",
]


@pytest.mark.parametrize("line", STRAY)
@pytest.mark.parametrize("name", ["shards/00001.jsonl", "index.jsonl", "unreadable.jsonl"])
def test_a_stray_line_is_found(model, images, whole, name, line):
    out, expected = whole
    (out / name).write_bytes(expected[name] + line.encode() + b"\n")
    done = assert_restored(model, images, whole)
    assert done.written == (1 if "shards" in name else 0)


def test_a_line_twice_is_found(model, images, whole):
    out, expected = whole
    first = expected["shards/00001.jsonl"].splitlines(keepends=True)[0]
    (out / "shards/00001.jsonl").write_bytes(first + expected["shards/00001.jsonl"])
    assert assert_restored(model, images, whole).written == 1


def test_the_index_of_another_shard_is_found(model, images, whole):
    out, expected = whole
    for name in ("00000.jsonl", "00000.safetensors"):
        (out / "shards" / name).write_bytes(expected[f"shards/{name.replace('0.', '1.')}"])
    assert assert_restored(model, images, whole, verify=True).written == 1


def test_a_changed_number_is_found(model, images, whole):
    """The index is JSON all the same, and only its digest knows."""
    out, expected = whole
    lines = [json.loads(line) for line in expected["shards/00000.jsonl"].splitlines()]
    next(line for line in lines if "grid" in line)["prefix_mass"] = [0.5]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / "shards/00000.jsonl").write_text(text)
    assert assert_restored(model, images, whole).written == 1


@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found_with_verify(model, images, whole, data):
    out, expected = whole
    name = data.draw(st.sampled_from([one for one in expected if one.startswith("shards")]))
    content = bytearray(expected[name])
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    (out / name).write_bytes(content)
    assert assert_restored(model, images, whole, verify=True).written == 1


@given(data=st.data())
def test_a_flipped_bit_in_an_index_or_a_header_is_found_without(model, images, whole, data):
    out, expected = whole
    name = data.draw(st.sampled_from([one for one in expected if one.startswith("shards")]))
    content = bytearray(expected[name])
    header = 8 + int.from_bytes(content[:8], "little")
    last = len(content) if name.endswith(".jsonl") else header
    place = data.draw(st.integers(0, last - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    (out / name).write_bytes(content)
    assert assert_restored(model, images, whole).written == 1


def test_a_preview_counts_what_would_be_written_again(model, images, whole):
    out, expected = whole
    path = out / "shards/00001.safetensors"
    content = bytearray(expected["shards/00001.safetensors"])
    content[-1] ^= 1
    path.write_bytes(content)
    options = {**OPTIONS, "dry_run": True}
    assert extract(model, images, out, **options).finished == 3
    assert extract(model, images, out, verify=True, **options).finished == 2
    assert_restored(model, images, whole, verify=True)


def test_what_is_damaged_is_named(model, images, whole, caplog):
    out, expected = whole
    (out / "shards/00001.jsonl").write_bytes(expected["shards/00001.jsonl"] + b"{}\n")
    assert_restored(model, images, whole)
    assert "00001.safetensors or its index was changed or damaged" in caplog.text
