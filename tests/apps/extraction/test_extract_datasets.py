"""``extract`` of what Python holds: datasets, lists of tensors and pictures, a transform."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms as T
from torchvision.datasets import FakeData, ImageFolder

from dinov2_attn import AttentionDataset, extract
from dinov2_attn.apps.extraction.given import GivenDecoder, Wanted
from dinov2_attn.apps.extraction.sources import fingerprint, source_of
from dinov2_attn.apps.extraction.worker import can_be_sent
from dinov2_attn.apps.viz.reading import IMAGENET
from dinov2_attn.errors import InvalidInputError, UnreadableFileError
from tests.support.extraction import build, draw, files_of, index_of, photographs, stored
from tests.support.tolerances import assert_close

MINE = T.Compose([T.Resize((6, 4)), T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)])


@pytest.fixture(scope="module")
def model(grafted):
    return build(grafted)


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        draw(tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.png", (8, 6), i)
    return tmp_path / "photos"


class Items(Dataset):
    """A dataset of what it is given, which raises what is an error."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        if isinstance(self.items[i], Exception):
            raise self.items[i]
        return self.items[i]


class Jittered(Items):
    """What is random in it comes from the generators that augmentation draws from."""

    def __getitem__(self, i):
        noise = torch.rand(3, 6, 4) + random.random() + np.random.rand()
        return self.items[i] + noise.float()


def tensors(count=3, size=(6, 4)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *size, generator=generator) for _ in range(count)]


def assert_maps_of(model, out, expected):
    """The maps in ``out`` are those of the tensors ``expected``, and read back."""
    dataset = AttentionDataset(out)
    assert len(dataset) == len(expected) > 0
    for i, tensor in enumerate(expected):
        with torch.no_grad():
            weights = model.get_last_self_attention(tensor[None].float(), queries="cls")
        found, entry = dataset[i], dataset.entry(i)
        assert found["number"] == entry["number"]
        assert entry["grid"] == [tensor.shape[1] // 2, tensor.shape[2] // 2]
        whole = torch.cat([found["prefix"][0], found["maps"][0].flatten(-2)], -1)
        assert_close(whole, weights[0], size=1.0)


# Kinds of sources


def test_a_folder_of_torchvision_with_its_own_transform(model, folder, tmp_path):
    mine = ImageFolder(folder, MINE)
    done = extract(model, mine, tmp_path / "out")
    assert (done.images, done.unreadable) == (5, 0)
    assert_maps_of(model, tmp_path / "out", [mine[i][0] for i in range(5)])
    paths = [entry["path"] for entry in index_of(tmp_path / "out")]
    assert paths == ["cat/0.png", "cat/2.png", "cat/4.png", "dog/1.png", "dog/3.png"]
    assert index_of(tmp_path / "out")[0]["source"] == "ImageFolder"
    assert index_of(tmp_path / "out")[0]["size"] == [6, 4]


def test_a_folder_of_torchvision_without_transform_is_like_the_folder(model, folder, tmp_path):
    extract(model, ImageFolder(folder), tmp_path / "dataset")
    extract(model, folder, tmp_path / "folder")
    pairs = zip(stored(tmp_path / "dataset"), stored(tmp_path / "folder"), strict=True)
    for (entry, maps, _), (entry_too, maps_too, _) in pairs:
        assert entry["path"] == entry_too["path"]
        assert entry["size"] == entry_too["size"] == [8, 6]
        assert maps.numpy().tobytes() == maps_too.numpy().tobytes()


def test_a_transform_of_ones_own_over_files(model, folder, tmp_path):
    done = extract(model, folder, tmp_path / "out", transform=MINE)
    assert (done.images, done.unreadable) == (5, 0)
    paths = [folder / entry["path"] for entry in index_of(tmp_path / "out")]
    assert_maps_of(model, tmp_path / "out", [MINE(Image.open(path)) for path in paths])
    for entry, path in zip(index_of(tmp_path / "out"), paths, strict=True):
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry["size"] == [8, 6]


def test_tensors_in_a_list(model, tmp_path):
    given = [*tensors(3), *tensors(2, (4, 10)), tensors(1)[0].double()]
    done = extract(model, given, tmp_path / "out")
    assert (done.images, done.unreadable) == (6, 0)
    assert_maps_of(model, tmp_path / "out", given)
    assert [entry["path"] for entry in index_of(tmp_path / "out")] == [
        f"item-00000{i}" for i in range(6)
    ]
    assert index_of(tmp_path / "out")[3]["size"] == [4, 10]


@pytest.mark.parametrize(
    "wrap",
    [
        tuple,
        torch.stack,
        lambda given: Items(*given),
        lambda given: TensorDataset(torch.stack(given), torch.arange(3)),
        lambda given: [(tensor, 7) for tensor in given],
        lambda given: [{"image": tensor, "label": 7} for tensor in given],
        lambda given: Items(*({"pixel_values": tensor} for tensor in given)),
        lambda given: [({"image": tensor}, 7) for tensor in given],
        lambda given: Subset(Items(None, *given), [1, 2, 3]),
        lambda given: [torch.nn.Parameter(tensor) for tensor in given],
        lambda given: list(DataLoader(Items(*given), batch_size=None)),
    ],
    ids=range(11),
)
def test_items_may_be_wrapped(model, tmp_path, wrap):
    extract(model, wrap(tensors()), tmp_path / "out")
    assert_maps_of(model, tmp_path / "out", tensors())


def test_one_tensor_is_one_image(model, tmp_path):
    (given,) = tensors(1)
    extract(model, given, tmp_path / "out")
    assert_maps_of(model, tmp_path / "out", [given])


def test_pictures_are_like_files(model, folder, tmp_path):
    paths = sorted(folder.rglob("*.png"))
    extract(model, [str(path) for path in paths], tmp_path / "files", image_size=6)
    extract(model, [Image.open(path) for path in paths], tmp_path / "pictures", image_size=6)
    extract(model, [(str(path), 7) for path in paths], tmp_path / "tuples", image_size=6)
    for other in ("pictures", "tuples"):
        pairs = zip(stored(tmp_path / "files"), stored(tmp_path / other), strict=True)
        for (_, maps, _), (entry, maps_too, _) in pairs:
            assert maps.numpy().tobytes() == maps_too.numpy().tobytes()
            assert entry["size"] == [8, 6]


def test_pictures_come_upright_and_in_rgb(model, tmp_path):
    grey = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    grey.save(tmp_path / "turned.png", exif=exif)
    extract(model, [Image.open(tmp_path / "turned.png")], tmp_path / "picture")
    extract(model, tmp_path / "turned.png", tmp_path / "file")
    ((entry, maps, _),), ((_, maps_too, _),) = (
        stored(tmp_path / "picture"),
        stored(tmp_path / "file"),
    )
    assert entry["size"] == [6, 4]
    assert maps.numpy().tobytes() == maps_too.numpy().tobytes()


def test_a_transform_follows_a_datasets_own(model, folder, tmp_path):
    mine = ImageFolder(folder, T.Resize((6, 4)))
    after = T.Compose([T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)])
    extract(model, mine, tmp_path / "out", transform=after)
    assert_maps_of(model, tmp_path / "out", [after(mine[i][0]) for i in range(5)])


def test_a_transform_in_place_does_not_change_the_users_tensors(model, tmp_path):
    given = tensors()
    extract(model, given, tmp_path / "out", transform=lambda tensor: tensor.mul_(0.5))
    for tensor, before in zip(given, tensors(), strict=True):
        assert tensor.numpy().tobytes() == before.numpy().tobytes()
    assert_maps_of(model, tmp_path / "out", [tensor * 0.5 for tensor in tensors()])


def test_fake_data_and_a_dry_run(model, tmp_path):
    fake = FakeData(4, (3, 8, 6))
    promised = extract(model, fake, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    done = extract(model, fake, tmp_path / "out")
    assert promised.images == done.images == 4
    numbers = sum(maps.numel() + prefix.numel() for _, maps, prefix in stored(tmp_path / "out"))
    assert promised.bytes == 4 * numbers


def test_a_model_of_half_precision(grafted, tmp_path):
    extract(build(grafted).bfloat16(), tensors(), tmp_path / "out")
    assert len(AttentionDataset(tmp_path / "out")) == 3


def test_outliers_of_tensors(model, tmp_path):
    extract(model, tensors(), tmp_path / "out", artifacts=True)
    assert all(entry["artifacts"] is not None for entry in index_of(tmp_path / "out"))


def test_tensors_that_are_a_view_of_other_signs(model, tmp_path):
    turned = torch.complex(torch.zeros(3, 6, 4), -tensors(1)[0][:, :6, :4]).conj().imag
    assert turned.is_neg()
    extract(model, [turned], tmp_path / "out")
    assert_maps_of(model, tmp_path / "out", [turned])


# What fails


def test_a_tensor_that_is_larger_than_an_image_may_be_is_not_written_out(model, tmp_path):
    items = [torch.zeros(3, 6, 4), torch.zeros(3, 1, 1).expand(3, 10**6, 10**6)]
    done = extract(model, items, tmp_path / "out", transform=lambda tensor: tensor[:, :6, :4])
    assert (done.images, done.unreadable) == (2, 1)
    (entry,) = index_of(tmp_path / "out", "unreadable.jsonl")
    assert "at most 1,600,000,000 bytes" in entry["reason"]


def test_an_item_that_fails_is_one_that_fails(model, tmp_path):
    good, large = tensors(2)
    items = [RuntimeError("no such record"), good, torch.zeros(3, 7, 4), large, KeyError("x")]
    items += [torch.zeros(3, 6, 4, dtype=torch.uint8), "nowhere.png", torch.zeros(1, 6, 4), None]
    done = extract(model, Items(*items), tmp_path / "out")
    assert (done.images, done.unreadable, done.failed) == (9, 7, 0)
    assert_maps_of(model, tmp_path / "out", [good, large])
    lines = index_of(tmp_path / "out", "unreadable.jsonl")
    assert [line["path"][-1] for line in lines] == list("0245678")
    assert {line["stage"] for line in lines} == {"decode"}
    reasons = [line["reason"] for line in lines]
    assert "item-000000 (RuntimeError: no such record)" in reasons[0]
    assert "multiples of the patch size 2; found item-000002 of 7 × 4" in reasons[1]
    assert "floating tensor (C, H, W); found item-000005: uint8 (3, 6, 4)" in reasons[3]
    assert "3 channels" in reasons[5]
    with pytest.raises(UnreadableFileError, match="no such record"):
        extract(model, Items(*items), tmp_path / "strict", strict=True)


def test_a_fixed_item_is_read_with_retry(model, tmp_path):
    good = tensors()
    extract(model, Items(good[0], ValueError("later"), good[2]), tmp_path / "out", shard_size=1)
    done = extract(model, Items(*good), tmp_path / "out", shard_size=1, retry=True)
    assert (done.written, done.unreadable) == (1, 0)
    assert_maps_of(model, tmp_path / "out", good)


def test_a_transform_that_raises_for_one(model, folder, tmp_path):
    def picky(image):
        if image.getpixel((0, 0)) == Image.open(folder / "dog" / "1.png").getpixel((0, 0)):
            raise ValueError("not this one")
        return MINE(image)

    assert extract(model, folder, tmp_path / "out", transform=picky).unreadable == 1
    (line,) = index_of(tmp_path / "out", "unreadable.jsonl")
    assert "not this one" in line["reason"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_stops_the_run_stops_it(model, tmp_path, error):
    def stop(_):
        raise error

    with pytest.raises(error):
        extract(model, tensors(), tmp_path / "out", transform=stop)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (torch.zeros(3, 6, 4, dtype=torch.uint8), r"float\(\) / 255"),
        ([torch.zeros(1, 3, 6, 4)] * 2, r"tensor\[0\]"),
        ([torch.zeros(2, 3, 6, 4)] * 2, r"list\(tensor\)"),
        ([torch.zeros(6, 4)], r"expand\(3, -1, -1\)"),
        ([torch.zeros(4)], "Give one image"),
        ([torch.zeros(1, 6, 4)], "3 channels"),
        ([torch.zeros(6, 4, 3)], "Put the channels first"),
        ([torch.zeros(3, 6, 4, device="meta")], "dense tensor with values"),
        ([torch.zeros(3, 6, 4).to_sparse()], "to_dense"),
        ([np.zeros((6, 4, 3), np.uint8)] * 5, r"Image.fromarray\(array\)"),
        ([{"img": 1}], r"'pixel_values'\.\nFound item-000000, with \['img'\]"),
        ([3, 4], "item-000000, a int"),
        ([()], "a tuple"),
        ({"image": torch.zeros(3, 6, 4)}, "Give a list of pictures"),
        (5, "Give a list of pictures"),
        (None, "Give a list of pictures"),
        ((x for x in "ab"), r"Give list\(source\)"),
        ({"a.png"}, r"Give list\(source\)"),
        ([], "a source of images"),
        (Items(), "a source of images"),
        (Dataset(), "without length"),
        ([torch.zeros(3, 6, 4), "a.png"], "a list with both, a Tensor at 0"),
    ],
)
def test_items_without_a_picture_are_refused_with_a_next_step(model, tmp_path, source, match):
    with pytest.raises(InvalidInputError, match=match):
        extract(model, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_have_their_size(model, tmp_path):
    with pytest.raises(InvalidInputError, match="Leave image_size out"):
        extract(model, tensors(), tmp_path / "out", image_size=4)
    with pytest.raises(InvalidInputError, match="transform as a function"):
        extract(model, tensors(), tmp_path / "out", transform="resize")


def test_more_pixels_than_allowed_are_a_reason(model, folder, tmp_path):
    given = [*tensors(1), *tensors(1, (8, 8)), Image.new("RGB", (6, 8))]
    assert extract(model, given, tmp_path / "out", max_pixels=40).unreadable == 2
    done = extract(model, folder, tmp_path / "files", max_pixels=40, transform=MINE)
    assert done.unreadable == 5


class Stream(IterableDataset):
    def __iter__(self):
        yield from tensors()


def test_a_loader_and_a_stream_are_refused_and_the_advice_works(model, tmp_path):
    for loader in (DataLoader(Items(*tensors()), batch_size=2), DataLoader(Stream())):
        with pytest.raises(InvalidInputError, match=r"Give (list\()?loader\.dataset"):
            extract(model, loader, tmp_path / "out")
    with pytest.raises(InvalidInputError, match=r"Give list\(source\)"):
        extract(model, Stream(), tmp_path / "out")
    loader = DataLoader(Items(*tensors()), batch_size=2)
    extract(model, loader.dataset, tmp_path / "loader")
    extract(model, list(Stream()), tmp_path / "stream")
    for out in ("loader", "stream"):
        assert_maps_of(model, tmp_path / out, tensors())


# Going on


def test_a_stopped_run_continues(model, folder, tmp_path):
    mine = ImageFolder(folder, MINE)
    extract(model, mine, tmp_path / "out", shard_size=2)
    whole = files_of(tmp_path / "out")
    for name in ("shards/00001.jsonl", "index.jsonl"):
        (tmp_path / "out" / name).unlink()
    assert extract(model, mine, tmp_path / "out", shard_size=2).written == 1
    assert files_of(tmp_path / "out") == whole
    folder.rename(tmp_path / "moved")
    moved = ImageFolder(tmp_path / "moved", MINE)
    assert extract(model, moved, tmp_path / "out", shard_size=2).seen == 0


def test_another_dataset_or_transform_is_another_extraction(model, folder, tmp_path):
    extract(model, ImageFolder(folder, MINE), tmp_path / "out")
    with pytest.raises(InvalidInputError, match="(?s)transform: .*now null"):
        extract(model, ImageFolder(folder), tmp_path / "out")
    with pytest.raises(InvalidInputError, match="(?s)transform: .*Resize"):
        extract(model, ImageFolder(folder, MINE), tmp_path / "out", transform=T.Resize(4))
    with pytest.raises(InvalidInputError, match="images: 5, now 4; listing"):
        extract(model, Subset(ImageFolder(folder, MINE), range(4)), tmp_path / "out")


def test_a_part_has_the_names_of_its_part(model, folder, tmp_path):
    extract(model, Subset(Subset(ImageFolder(folder), [4, 3, 0]), [0, 2]), tmp_path / "out")
    assert [entry["path"] for entry in index_of(tmp_path / "out")] == ["dog/3.png", "cat/0.png"]


def test_fingerprints_tell_functions_apart_in_every_process():
    one, other = (lambda x: x / 2), (lambda x: x / 3)
    assert fingerprint(one) != fingerprint(other)
    assert "0x" not in fingerprint(one)
    assert fingerprint() is fingerprint(None) is None
    assert "Resize" in fingerprint(MINE)


def test_what_is_random_belongs_to_its_item(model, tmp_path):
    state = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    for out, size in (("one", 2), ("two", 2)):
        extract(model, Jittered(*tensors(5)), tmp_path / out, shard_size=size)
        if out == "one":
            torch.rand(3), random.random(), np.random.rand()
            torch.set_rng_state(state[2])
            random.setstate(state[0])
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    for name in ("shards/00001.jsonl", "index.jsonl"):
        (tmp_path / "two" / name).unlink()
    extract(model, Jittered(*tensors(5)), tmp_path / "two", shard_size=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_generators_stay_where_they_were(model, tmp_path):
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy()
    extract(model, Jittered(*tensors(5)), tmp_path / "out")
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]
    assert torch.get_rng_state().numpy().tobytes() == before[2].tobytes()


# Workers


class FromFiles(Dataset):
    """As a script has it: importable, and random."""

    def __init__(self, folder):
        self.paths = sorted(Path(folder).rglob("*.png"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        if i == 70:
            raise ValueError("the seventieth")
        image = Image.open(self.paths[i]).resize((4, 6))
        return {"image": T.functional.to_tensor(image) + torch.rand(1), "process": os.getpid()}


def test_workers_make_the_same_bytes(model, tmp_path):
    mine = FromFiles(photographs(tmp_path / "in", 130))
    for workers in (0, 2):
        done = extract(model, mine, tmp_path / str(workers), shard_size=50, workers=workers)
        assert done.unreadable == 1
    assert files_of(tmp_path / "0") == files_of(tmp_path / "2")


def test_what_cannot_be_pickled_is_decoded_here(model, tmp_path):
    mine = FromFiles(photographs(tmp_path / "in", 130))
    mine.here = lambda: None
    assert extract(model, mine, tmp_path / "out", workers=2).images == 130


def test_what_is_sent_to_workers(monkeypatch):
    wanted = Wanted(2, IMAGENET, None, None)
    assert can_be_sent(source_of(Items(*tensors()), None).decoder(wanted))
    assert not can_be_sent(source_of(tensors(), None).decoder(wanted))
    assert not can_be_sent(source_of(tensors(), None).measurer(wanted))
    assert not can_be_sent(GivenDecoder(len, lambda x: x, wanted))
    # As in a notebook, whose classes no other process can import.
    monkeypatch.setattr(Items, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Items", Items, raising=False)
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    assert not can_be_sent(source_of(Items(*tensors()), None).decoder(wanted))
