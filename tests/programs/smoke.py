"""What a user does first, with the installed wheel and only PyTorch.

``python -I tests/programs/smoke.py FOLDER``, where FOLDER is what the wheel was installed into:
-I, so that no path of this checkout helps. It says nothing and fails with the first thing that is
wrong.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib import metadata, resources
from pathlib import Path

import torch

# What the extras bring; the core does without.
OPTIONAL = ("numpy", "matplotlib", "torchvision", "PIL", "tqdm", "xformers")


def can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def package_is_whole(folder: Path) -> None:
    import dinov2_attn

    assert Path(dinov2_attn.__file__).is_relative_to(folder), dinov2_attn.__file__
    assert metadata.version("dinov2-attn") == dinov2_attn.__version__
    package = resources.files(dinov2_attn)
    assert (package / "py.typed").is_file()
    assert json.loads((package / "history" / "eras.json").read_text())
    for name in dinov2_attn.__all__:
        getattr(dinov2_attn, name)


def attention_of_upstream() -> None:
    import dinov2_attn
    from dinov2_attn.apps.weights.models import build
    from dinov2_attn.apps.weights.source import from_pypi

    handle = dinov2_attn.install()
    from_pypi()
    model = build("vit_small", img_size=28)
    assert "verified" in str(dinov2_attn.status()), dinov2_attn.status()
    images = torch.rand(2, 3, 28, 42)
    with torch.no_grad():
        last = model.get_last_self_attention(images)
        with dinov2_attn.record(model) as maps:
            features = model(images)
        flow = dinov2_attn.rollout(model, images, heads="mean").patch_maps()
    assert last.shape == (2, 6, 7, 7)
    from dinov2_attn.proof.conformance.tolerances import assert_close

    assert_close(last.sum(-1), torch.ones(2, 6, 7))
    assert_close(maps.weights[-1], last)
    assert maps.grid == (2, 3)
    assert flow.shape == (2, 1, 2, 3)
    handle.uninstall()
    assert not hasattr(model, "get_last_self_attention")
    # With grad, where PyTorch may take another kernel than the recorded pass did.
    assert_close(model(images), features)


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors here are tiny
    found = [name for name in OPTIONAL if can_import(name)]
    assert not found, f"this proves nothing where {found} can be imported"
    package_is_whole(Path(sys.argv[1]).resolve())
    attention_of_upstream()
