"""TensorBoard, Weights & Biases and Lightning, each with its own library."""

from __future__ import annotations

import importlib
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dinov2_attn import AttentionLogger, lightning_callback
from dinov2_attn.errors import InvalidInputError, NotDrawnWarning
from tests.support.extraction import build
from tests.support.strategies import noise
from tests.support.tolerances import assert_same_bits

pytest.importorskip("matplotlib")
INPUT = noise(3, 4, 6, seed=3)
EXTRA = "pip install 'dinov2-attn[training]'"
NAME = "attention/layer2/mean/cls/0"
# The libraries' own warnings differ from version to version.
pytestmark = pytest.mark.filterwarnings("ignore")


def images_in(folder):
    """Return name and step of every image that TensorBoard finds in ``folder``."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason=EXTRA
    )
    found = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0})
    found.Reload()
    return [(name, one.step, one) for name in found.Tags()["images"] for one in found.Images(name)]


def test_tensorboard_has_a_picture_of_each_step(first, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason=EXTRA)
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        pictures = AttentionLogger(build(first), [INPUT, INPUT], writer, every=10)
        for step in range(25):
            pictures(step)
    found = images_in(tmp_path)
    names = [NAME, NAME[:-1] + "1"]
    assert [(name, step) for name, step, _ in found] == [
        (name, step) for name in names for step in (0, 10, 20)
    ]
    assert found[0][2].encoded_image_string.startswith(b"\x89PNG")
    assert found[0][2].width > 100


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """Weights & Biases without a network."""
    library = pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield library
    library.teardown()


def records_of(content):
    """Yield the records of an offline run: LevelDB's log behind a header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # no header fits: the block ends
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


def history_of(folder):
    """Return every entry of the log of the offline run in ``folder``, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.rglob("run-*.wandb")
    records = [Record.FromString(data) for data in records_of(file.read_bytes())]
    return [
        {one.key or "/".join(one.nested_key): one.value_json for one in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def test_weights_and_biases_has_them_beside_the_numbers_of_the_step(first, tmp_path, wandb):
    with wandb.init(project="p") as run:
        pictures = AttentionLogger(build(first), INPUT, run, every=2)
        for step in range(4):
            run.log({"before": step})  # a training may log several times in a step
            pictures(step)
            run.log({"loss": step / 2})
    wandb.teardown()  # its service may be writing still
    entries = history_of(tmp_path)
    drawn = [entry for entry in entries if any(NAME in key for key in entry)]
    assert [float(entry["loss"]) for entry in drawn] == [0.0, 1.0]
    assert "step 2" in str(drawn[1])
    assert len(list(tmp_path.rglob("media/images/**/*.png"))) == 2


def lightning_module(package, upstream):
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.student = build(upstream, drop_path_rate=0.2)
            self.norm = nn.BatchNorm1d(8)

        def training_step(self, batch, _):
            return self.norm(self.student(batch)).square().mean() + torch.rand(())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    return Module()


def fitted(package, upstream, folder, callbacks, logger=None, **options):
    torch.manual_seed(0)
    module = lightning_module(package, upstream)
    trainer = package.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=[] if logger is None else logger,
        callbacks=callbacks,
        default_root_dir=str(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(torch.randn(8, 3, 4, 6), batch_size=2))
    return [torch.get_rng_state(), *module.state_dict().values()]


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request):
    return pytest.importorskip(request.param, reason=EXTRA)


def test_lightning_trains_the_same_with_pictures(first, package, tmp_path):
    loggers = importlib.import_module(f"{package.__name__}.loggers")
    pytest.importorskip("tensorboard", reason=EXTRA)
    callback = lightning_callback(INPUT, every=3)
    assert isinstance(callback, package.Callback)
    without = fitted(package, first, tmp_path, [], loggers.TensorBoardLogger(str(tmp_path / "a")))
    logger = loggers.TensorBoardLogger(str(tmp_path / "b"))
    left = fitted(package, first, tmp_path, [callback], logger)
    assert_same_bits(left, without)
    found = images_in(logger.log_dir)
    assert [(name, step) for name, step, _ in found] == [(NAME, 0), (NAME, 3), (NAME, 6)]


def test_gradients_that_accumulate_give_no_picture_twice(first, package, tmp_path):
    pages = Pages()
    callback = lightning_callback(INPUT, every=1, to=pages)
    fitted(package, first, tmp_path, [callback], accumulate_grad_batches=2)
    assert pages.steps == [0, 1, 2, 3, 4]


class Pages:
    def __init__(self):
        self.steps = []

    def add_image(self, name, pixels, global_step, dataformats):
        self.steps.append(global_step)


def test_lightning_and_weights_and_biases(first, package, tmp_path, wandb):
    loggers = importlib.import_module(f"{package.__name__}.loggers")
    logger = loggers.WandbLogger(project="p", save_dir=str(tmp_path), offline=True)
    fitted(package, first, tmp_path, [lightning_callback(INPUT, every=5)], logger)
    wandb.finish()
    assert len(list(tmp_path.rglob("media/images/**/*.png"))) == 2


def test_wrong_arguments_end_a_training_before_it_begins(first, package, tmp_path):
    loggers = importlib.import_module(f"{package.__name__}.loggers")
    with pytest.raises(InvalidInputError, match="Found CSVLogger"):
        fitted(package, first, tmp_path, [lightning_callback(INPUT)], loggers.CSVLogger(tmp_path))
    for wrong in ({"backbone": "teacher"}, {"layers": [5]}, {"every": 0}):
        with pytest.raises(InvalidInputError):
            fitted(package, first, tmp_path, [lightning_callback(INPUT, to=Pages(), **wrong)])


def test_a_picture_that_fails_does_not_end_a_training(first, package, tmp_path):
    class Full(Pages):
        def add_image(self, *_, **__):
            raise OSError("no space left")

    with pytest.warns(NotDrawnWarning, match="no space left"):
        fitted(package, first, tmp_path, [lightning_callback(INPUT, to=Full(), every=1)])


def test_a_callback_is_pickled_by_its_arguments(package):
    callback = lightning_callback(["a.png"], every=7, backbone="student")
    copy = pickle.loads(pickle.dumps(callback))
    assert type(copy) is type(callback)
    assert copy._given == callback._given


def test_without_lightning_the_error_names_the_extra(tmp_path):
    from tests.support.subprocesses import python

    code = """
import sys
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
import dinov2_attn
try:
    dinov2_attn.lightning_callback("a.png")
except dinov2_attn.Dinov2AttnError as error:
    print(error.hint)
"""
    done = python("-c", code, cwd=tmp_path)
    assert "pip install 'dinov2-attn[training]'" in done.stdout, done.stderr
