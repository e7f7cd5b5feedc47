"""Results can be compared with anything, looked for in lists and put into sets."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import dinov2_attn
from dinov2_attn import AttentionDataset, artifact_tokens, attention_maps, extract, record, rollout
from tests.support.recordings import IMAGES, build


@pytest.fixture(scope="module")
def extracted(grafted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("extracted")
    (folder / "in").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (6, 6, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "in" / f"{i}.png")
    model = build(grafted).float()
    preview = extract(model, folder / "in", folder / "out", dry_run=True)
    return preview, extract(model, folder / "in", folder / "out"), folder / "out"


def of_one_pass(grafted, extracted):
    """Return each kind of result, made again."""
    model = build(grafted)
    with record(model) as recording:
        model(IMAGES)
    preview, summary, folder = extracted
    dataset = AttentionDataset(folder)
    return {
        "AttentionMaps": attention_maps(model, IMAGES),
        "numpy": attention_maps(model, IMAGES).numpy(),
        "ArtifactTokens": artifact_tokens(model, IMAGES),
        "Recording": recording,
        "Rollout": rollout(model, IMAGES),
        "arrays of a rollout": rollout(model, IMAGES).numpy(),
        "arrays of artifacts": artifact_tokens(model, IMAGES).numpy(),
        "Status": dinov2_attn.status(),
        "Handle": dinov2_attn.install(),
        "Preview": copy.copy(preview),
        "Summary": copy.copy(summary),
        "AttentionDataset": dataset,
        "row": dataset[0],
    }


OTHERS = [None, 0, "text", (), [], {}, object()]


KINDS = (
    *("AttentionMaps", "numpy", "ArtifactTokens", "Recording", "Rollout", "Status", "Handle"),
    *("Preview", "Summary", "AttentionDataset", "row"),
    *("arrays of a rollout", "arrays of artifacts"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_compared_without_an_error(grafted, extracted, kind):
    one, other = (of_one_pass(grafted, extracted)[kind] for _ in range(2))
    assert one == one  # noqa: PLR0124
    assert one in [other, one]
    assert {one: 1}[one] == 1
    equal = one == other
    assert isinstance(equal, bool)
    assert (one != other) is not equal
    assert (one in [other]) is equal
    assert equal is (kind in ("Status", "Preview", "Summary"))
    if equal:
        assert hash(one) == hash(other)
    for thing in OTHERS:
        assert (one == thing) is False
        assert (thing == one) is False
        assert one not in [thing]


def test_rows_are_collated_like_any_dictionary(grafted, extracted):
    dataset = AttentionDataset(extracted[2])
    (batch,) = torch.utils.data.DataLoader(dataset, batch_size=2)
    assert batch["maps"].shape == (2, *dataset[0]["maps"].shape)
    assert batch["number"].tolist() == [0, 1]
    assert dict(dataset[0]).keys() == {"maps", "prefix", "path", "number"}
