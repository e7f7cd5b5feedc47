"""Orders of import, install and torch.hub that one process can go through only once."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch

import dinov2_attn
from dinov2_attn.apps.weights.source import DINOV2_WHEEL
from tests.programs import event_order_runner
from tests.support import upstreams
from tests.support.dinov2_package import load, small_model
from tests.support.mutations import unpack
from tests.support.strategies import noise
from tests.support.subprocesses import python
from tests.support.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("first")


def run_fresh(folder, code, *arguments):
    """Run ``code`` in a process of its own: what imports do there cannot be reached from here."""
    result = python("-W", "ignore", "-c", textwrap.dedent(code), *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_the_package_imports_neither_torch_nor_upstream(tmp_path):
    code = """
        import sys, dinov2_attn
        handle = dinov2_attn.install(); dinov2_attn.status(); handle.uninstall()
        print(*[m for m in ("torch", "numpy", "dinov2", "PIL") if m in sys.modules])
    """
    assert run_fresh(tmp_path, code) == []


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Upstream as torch.hub loads it from a folder."""
    folder = tmp_path_factory.mktemp("repository")
    unpack(upstreams.FIRST, folder)
    (folder / "hubconf.py").write_text(
        "def tiny():\n"
        "    from dinov2.models.vision_transformer import DinoVisionTransformer\n"
        "    return DinoVisionTransformer(img_size=4, patch_size=2, embed_dim=4, depth=1,\n"
        "                                 num_heads=1, block_chunks=0)\n"
    )
    return folder


# Each begins in another way; test_events goes through everything that one process can.
ORDERS = [
    "package install torch hub reload uninstall hub",
    "package install hub purge hub uninstall",
    "package install uninstall upstream install purge uninstall upstream",
    "torch package install upstream package uninstall purge upstream install",
    "torch hub package install uninstall",
    "hub package install purge uninstall upstream",
    "upstream package install reload package uninstall install",
    "upstream purge package install package uninstall hub install",
]


@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_first_imports(repository, order):
    result = python(
        "-W", "ignore", event_order_runner.__file__, repository, *order.split(), cwd=repository
    )
    assert result.stdout == "fine\n", result.stderr


def test_a_model_saved_with_the_plugin_loads_without_it(tmp_path):
    dinov2_attn.install()
    model = small_model(load())
    images = noise(1, 3, 4, 4, seed=0)
    torch.save(model, tmp_path / "model.pt")
    torch.save((images, model(images)), tmp_path / "expected.pt")
    path = next(
        p for p in sys.path if p.endswith(f"{DINOV2_WHEEL.version}.whl") or p == upstreams.CHECKOUT
    )
    code = """
        import sys; sys.path.append(sys.argv[2])
        import torch
        model = torch.load(sys.argv[1] + "/model.pt", **({"weights_only": False}))
        images, _ = torch.load(sys.argv[1] + "/expected.pt")
        torch.save(model(images), sys.argv[1] + "/found.pt")
        print("dinov2_attn" in sys.modules)
    """
    assert run_fresh(tmp_path, code, tmp_path, path) == ["False"]
    # Another process may compute in as many threads as it likes.
    expected = torch.load(tmp_path / "expected.pt")[1]
    assert_close(torch.load(tmp_path / "found.pt"), expected)
