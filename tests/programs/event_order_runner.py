"""Run as a program: go through events in the order given, and check after each what holds.

``python orders.py FOLDER EVENT ...``, where ``FOLDER`` is a checkout of upstream with an entry
point ``tiny`` for torch.hub. It prints ``fine`` if everything held.
"""

from __future__ import annotations

import importlib
import inspect
import sys

ATTENTION, BLOCK, MODEL = UPSTREAM = (
    "dinov2.layers.attention",
    "dinov2.layers.block",
    "dinov2.models.vision_transformer",
)


class Process:
    """What has been imported and installed here so far, and what that should have done."""

    def __init__(self, folder):
        self.folder = folder
        self.installed = False
        self.originals = {}  # of every model class met, its own forward
        self.grafted = set()

    def torch(self):
        importlib.import_module("torch")

    def upstream(self):
        importlib.import_module(MODEL)

    def package(self):
        """Import dinov2_attn, or import its front once more."""
        package = sys.modules.get("dinov2_attn")
        importlib.reload(package) if package else importlib.import_module("dinov2_attn")

    def hub(self):
        """Let torch.hub put the repository on the path for a moment and import it from there."""
        import torch

        torch.hub.load(self.folder, "tiny", source="local")

    def install(self):
        sys.modules["dinov2_attn"].install()
        self.installed = True

    def uninstall(self):
        sys.modules["dinov2_attn"].uninstall()
        self.installed = False
        self.grafted.clear()

    def purge(self):
        for name in [name for name in sys.modules if name.partition(".")[0] == "dinov2"]:
            del sys.modules[name]

    def reload(self):
        for name in UPSTREAM:
            importlib.reload(sys.modules[name])

    def check(self):
        module = sys.modules.get(MODEL)
        if module is not None:
            cls = module.DinoVisionTransformer
            self.originals.setdefault(cls, inspect.unwrap(cls.forward))
            if self.installed:
                self.grafted.add(cls)
        for cls, original in self.originals.items():
            assert answers(cls) == (cls in self.grafted)
            assert (vars(cls)["forward"] is original) == (cls not in self.grafted)
        missing = [name for name in UPSTREAM if name not in sys.modules]
        finders = [f for f in sys.meta_path if "dinov2_attn" in type(f).__module__]
        assert len(finders) == self.installed
        if "dinov2_attn" in sys.modules:
            status = sys.modules["dinov2_attn"].status()
            assert status.pending == (tuple(missing) if self.installed else ())
            assert bool(status.grafted) == bool(self.grafted)


def answers(cls):
    import torch

    model = cls(img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1, block_chunks=0)
    if not hasattr(model, "get_last_self_attention"):
        return False
    return model.get_last_self_attention(torch.rand(1, 3, 4, 6)).shape == (1, 1, 7, 7)


def main(folder, *events):
    sys.path.insert(0, folder)
    process = Process(folder)
    for event in events:
        before = "torch" in sys.modules
        getattr(process, event)()
        process.check()
        # Whoever asks for nothing that needs it does not wait for PyTorch.
        lazy = event in ("package", "install", "uninstall", "purge")
        assert not lazy or ("torch" in sys.modules) == before
    print("fine")


if __name__ == "__main__":
    main(*sys.argv[1:])
