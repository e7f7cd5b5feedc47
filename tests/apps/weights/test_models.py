"""Upstream's models as its hub builds them, and the strict loading of weights."""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import torch
from torch import nn

from dinov2_attn.apps.weights import source
from dinov2_attn.apps.weights.checkpoints import load_checkpoint
from dinov2_attn.apps.weights.models import build
from dinov2_attn.apps.weights.source import load_pretrained
from dinov2_attn.errors import InvalidInputError, UnavailableError, UnreadableFileError
from tests.support import upstreams
from tests.support.subprocesses import OFFLINE, python
from tests.support.tolerances import assert_same_bits, same_bits


@pytest.fixture(scope="module", autouse=True)
def _imported():
    upstreams.FIRST.module("dinov2.models.vision_transformer")


@pytest.fixture
def linear():
    return nn.Linear(3, 2)


def untouched(model):
    """Return a check that the weights of ``model`` are still what they are now."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return lambda: same_bits(dict(model.state_dict()), before)


def test_a_model_is_what_upstreams_hub_builds():
    model = build("vit_small")
    assert not model.training
    assert not model.chunked_blocks
    assert model.patch_size == 14
    assert model.pos_embed.shape == (1, 1 + 37 * 37, 384)
    assert len(model.blocks) == 12
    assert_same_bits(model.blocks[0].ls1.gamma, torch.ones(384))


def test_patch_size_and_image_size_are_passed_on():
    model = build("vit_small", patch_size=16, img_size=64)
    assert model.patch_size == 16
    assert model.pos_embed.shape == (1, 1 + 4 * 4, 384)


@pytest.mark.parametrize(
    ("arch", "ffn"),
    [(arch, "mlp") for arch in ("vit_small", "vit_base", "vit_large")]
    + [("vit_giant2", "swiglufused")],
)
def test_each_architecture_has_its_own_builder_and_ffn(monkeypatch, arch, ffn):
    # Only the arguments: the real giant would take five gigabytes.
    asked = {}
    models = sys.modules["dinov2.models.vision_transformer"]
    monkeypatch.setattr(models, arch, lambda **kwargs: asked.update(kwargs) or nn.Identity())
    build(arch)
    assert asked == {
        "patch_size": 14,
        "img_size": 518,
        "init_values": 1.0,
        "ffn_layer": ffn,
        "block_chunks": 0,
    }


def test_registers_come_with_their_positional_embedding(with_registers):
    model = build("vit_small", registers=True, img_size=56)
    assert model.register_tokens.shape == (1, 4, 384)
    assert model.interpolate_antialias is True
    assert model.interpolate_offset == 0.0


def test_a_revision_without_registers_names_the_next_step():
    if upstreams.FIRST.has_registers:
        pytest.skip("the checkout under test has registers")
    with pytest.raises(UnavailableError, match=r"(?s)2023-10-27.*Found one without.*--repo PATH"):
        build("vit_small", registers=True)


def test_an_unknown_architecture_lists_the_known():
    with pytest.raises(
        InvalidInputError, match=r"(?s)vit_small, .*Found 'vit_tiny'\.\nChoose one of them\.$"
    ):
        build("vit_tiny")


def test_a_patch_is_a_pixel_at_least_and_the_image_at_most():
    for patch_size in (1, 4):
        assert build("vit_small", patch_size=patch_size, img_size=4).patch_size == patch_size
    for patch_size in (0, 5):
        with pytest.raises(
            InvalidInputError, match=rf"(?s)size from 1 to 4, .*\.\nFound {patch_size}\.\nThe"
        ):
            build("vit_small", patch_size=patch_size, img_size=4)


# Weights


def test_weights_come_back_as_they_were_saved(tmp_path):
    saved, loaded = build("vit_small", img_size=56), build("vit_small", img_size=56)
    torch.save(saved.state_dict(), tmp_path / "weights.pth")
    load_checkpoint(loaded, tmp_path / "weights.pth")
    assert_same_bits(list(saved.parameters()), list(loaded.parameters()))


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"weight": torch.zeros(2, 3)}, "1 missing: bias"),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)},
            "1 left over: more",
        ),
        (
            {"weight": torch.zeros(9, 3), "bias": torch.zeros(2)},
            r"1 of another shape: weight \(9, 3\) for \(2, 3\)",
        ),
        (
            {f"blocks.{i}": torch.zeros(1) for i in range(9)},
            "2 missing: weight, bias; 9 left over: blocks.0, .*, blocks.4, …",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_where(linear, tmp_path, state, found):
    torch.save(state, tmp_path / "weights.pth")
    intact = untouched(linear)
    with pytest.raises(
        UnreadableFileError, match=rf"(?s)Expected .*key by key\.\nFound .*{found}.*Build the model"
    ):
        load_checkpoint(linear, tmp_path / "weights.pth")
    assert intact()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, "an empty dict"),
        ([torch.zeros(1)], "an object of type list"),
        ({"epoch": 3, "model": {}}, "a dict of epoch, model"),
        ({0: torch.zeros(1)}, "a dict of 0"),
    ],
)
def test_a_checkpoint_without_named_tensors_says_what_it_holds(linear, tmp_path, content, found):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UnreadableFileError, match=f"(?s)names to tensors.*holds {found}.\nSave"):
        load_checkpoint(linear, tmp_path / "weights.pth")


@pytest.mark.parametrize("length", [0, 1, 100, 600, -1])
def test_a_truncated_checkpoint_is_unreadable(linear, tmp_path, length):
    file = tmp_path / "weights.pth"
    torch.save(linear.state_dict(), file)
    file.write_bytes(file.read_bytes()[:length])
    intact = untouched(linear)
    with pytest.raises(
        UnreadableFileError, match=r"(?s)Found .*(cut short|empty|text).*Download it again"
    ):
        load_checkpoint(linear, file)
    assert intact()


def test_a_file_that_is_no_checkpoint_is_unreadable(linear, tmp_path):
    (tmp_path / "notes.txt").write_text("no tensors here")
    with pytest.raises(
        UnreadableFileError, match=r"notes.txt, text that begins with 'no tensors here'"
    ):
        load_checkpoint(linear, tmp_path / "notes.txt")


class Code:
    """Creates a file wherever it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_not_run(linear, tmp_path):
    torch.save(Code(tmp_path / "trace"), tmp_path / "weights.pth")
    with pytest.raises(UnreadableFileError, match=r"(?s)and plain data\.\nFound .*does not load"):
        load_checkpoint(linear, tmp_path / "weights.pth")
    assert not (tmp_path / "trace").exists()


class Scripted(nn.Module):
    """Creates a file wherever TorchScript loads it."""

    def __init__(self, path):
        super().__init__()
        self.path, self.content = path, torch.zeros(1)

    def forward(self):
        return self.content

    @torch.jit.export
    def __getstate__(self):
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path, self.training = state
        self.content = torch.from_file(self.path, True, 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
def test_torchscript_in_a_checkpoint_is_not_run(linear, tmp_path):
    """PyTorch before 2.6 runs it, ``weights_only`` or not."""
    file, trace = tmp_path / "weights.pth", tmp_path / "trace"
    torch.jit.script(Scripted(str(trace))).save(file)
    torch.jit.load(file)
    assert trace.exists(), "the archive would not have run anywhere"
    trace.unlink()
    with pytest.raises(
        UnreadableFileError, match=r"(?s)Found .*, a TorchScript archive, which holds"
    ):
        load_checkpoint(linear, file)
    assert not trace.exists()


def test_a_tar_is_not_unpacked(linear, tmp_path):
    """What PyTorch 0.1 wrote; PyTorch before 2.6 takes it for a checkpoint still."""
    with tarfile.open(tmp_path / "weights.pth", "w") as tar:
        tar.add(__file__, "storages")
    with pytest.raises(
        UnreadableFileError, match=r"(?s)Found .*, a tar archive, which PyTorch would unpack"
    ):
        load_checkpoint(linear, tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("name", "found"), [("", "a directory with no file of weights"), ("absent.pth", "nothing")]
)
def test_a_path_without_a_file_is_unreadable(linear, tmp_path, name, found):
    with pytest.raises(
        UnreadableFileError, match=rf"(?s)Expected a checkpoint at .*\.\nFound {found}\.\nName"
    ):
        load_checkpoint(linear, tmp_path / name)


# Published weights


def test_weights_in_the_cache_of_torch_hub_are_used(linear, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "dinov2_vitg14_reg4_pretrain.pth"
    file.parent.mkdir(parents=True)
    ones = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    torch.save(ones, file)
    load_pretrained(linear, "vit_giant2", patch_size=14, registers=True)
    assert_same_bits(linear.weight, ones["weight"])


def test_the_error_for_a_partial_download_names_the_file_to_remove(linear, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "dinov2_vits14_pretrain.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"PK")
    with pytest.raises(
        UnreadableFileError, match=f"(?s)Found {file}.*Remove the file and run again"
    ):
        load_pretrained(linear, "vit_small", patch_size=14, registers=False)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Meta's server as far as a download sees it; gives the bytes to send, by their length."""
    sent = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(sent["announced"]))
            self.end_headers()
            self.wfile.write(sent["content"])

        def log_message(self, *_):
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setattr(source, "PUBLISHED_AT", f"http://127.0.0.1:{http.server_port}")
        yield sent
        http.shutdown()


@pytest.mark.parametrize("missing", [0, 100])
def test_a_download_is_kept_after_the_model_is_filled(linear, tmp_path, server, missing):
    """A line that breaks is an end of file to torch.hub: a cache would keep half a file."""
    ones, buffer = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, io.BytesIO()
    torch.save(ones, buffer)
    whole = buffer.getvalue()
    server.update(announced=len(whole), content=whole[: len(whole) - missing])
    cache = tmp_path / "hub" / "checkpoints"
    if missing:
        with pytest.raises((UnreadableFileError, UnavailableError)):
            load_pretrained(linear, "vit_small", patch_size=14, registers=False)
        assert list(cache.iterdir()) == []
    else:
        load_pretrained(linear, "vit_small", patch_size=14, registers=False)
        assert_same_bits(linear.weight, ones["weight"])
        assert [file.read_bytes() for file in cache.iterdir()] == [whole]


def test_a_download_is_written_to_a_temporary_file(linear, tmp_path, server, monkeypatch, caplog):
    """Elsewhere may be another disk, from which nothing is moved in one step."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    buffer = io.BytesIO()
    torch.save(linear.state_dict(), buffer)
    server.update(announced=len(buffer.getvalue()), content=buffer.getvalue())
    caplog.set_level("INFO", "dinov2_attn")
    load_pretrained(linear, "vit_large", patch_size=14, registers=True)
    (file,) = (tmp_path / "hub" / "checkpoints").iterdir()
    assert file.name == "dinov2_vitl14_reg4_pretrain.pth"
    assert caplog.messages[0] == f"downloading {source.PUBLISHED_AT}/dinov2_vitl14/{file.name}"


def test_another_patch_size_has_no_published_weights(linear):
    with pytest.raises(
        UnavailableError, match=r"(?s)patch size 14.*Found patch size 16.*--random-weights"
    ):
        load_pretrained(linear, "vit_small", patch_size=16, registers=False)


def test_without_network_the_error_names_the_other_ways(tmp_path):
    code = """
from torch import nn
from dinov2_attn.apps.weights import source
from dinov2_attn.apps.weights.source import load_pretrained
try:
    load_pretrained(nn.Linear(3, 2), "vit_base", patch_size=14, registers=False)
except Exception as error:
    print(type(error).__name__, error)
"""
    printed = python("-c", code, cwd=tmp_path, **OFFLINE, TORCH_HOME=tmp_path).stdout
    assert printed.startswith("UnavailableError Expected the published weights")
    assert "/dinov2_vitb14/dinov2_vitb14_pretrain.pth.\nFound URLError" in printed
    assert "--weights PATH" in printed
    assert "--random-weights" in printed
