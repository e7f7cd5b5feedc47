"""Which packages may still bring attention: those are awaited, and all others refused at once."""

from __future__ import annotations

import importlib
import py_compile
import sys
import textwrap

import pytest
from torch import nn

import dinov2_attn
from dinov2_attn.errors import IncompatibleUpstreamError
from tests.support import upstreams
from tests.support.dinov2_package import MODEL, load

pytestmark = pytest.mark.usefixtures("first")

ATTENTION = "def attend(self):\n    return self.qkv(1)\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write the files of a package ``vit``, and import it and the modules named."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(files, imported=()):
        for path, text in files.items():
            file = tmp_path / "vit" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        for name in ("vit", *imported):
            importlib.import_module(name)

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] in ("vit", "vit_tools")]:
        del sys.modules[name]


AWAITED = {
    "a module": ({"__init__.py": "", "layers.py": ATTENTION}, ()),
    "a module of a part": ({"__init__.py": "", "deep/__init__.py": "", "deep/a.py": ATTENTION}, ()),
    "a part itself": ({"__init__.py": "", "deep/__init__.py": ATTENTION}, ()),
    "a module of a part that is imported": (
        {"__init__.py": "", "deep/__init__.py": "", "deep/a.py": ATTENTION},
        ("vit.deep",),
    ),
    "one module of several": (
        {"__init__.py": "", "a.py": "", "b.py": ATTENTION, "c/__init__.py": ""},
        ("vit.a",),
    ),
}
COMPLETE = {
    "no module at all": ({"__init__.py": ""}, ()),
    "modules without a projection": (
        {"__init__.py": "", "a.py": "qkv = 1", "b/__init__.py": "", "b/c.py": "a.qkvs = 1"},
        (),
    ),
    "a module that is imported": ({"__init__.py": "", "layers.py": ATTENTION}, ("vit.layers",)),
    "all parts are imported": (
        {"__init__.py": "", "deep/__init__.py": "", "deep/a.py": ATTENTION},
        ("vit.deep", "vit.deep.a"),
    ),
}


@pytest.mark.parametrize("kind", AWAITED)
def test_what_may_still_come_is_awaited(package, kind):
    package(*AWAITED[kind])
    with dinov2_attn.install("vit"):
        assert dinov2_attn.status().pending == ("vit",)
    assert str(dinov2_attn.status()) == "nothing installed"


@pytest.mark.parametrize("kind", COMPLETE)
def test_a_package_that_can_bring_none_is_refused(package, kind):
    package(*COMPLETE[kind])
    with pytest.raises(IncompatibleUpstreamError, match="none in vit"):
        dinov2_attn.install("vit")
    assert str(dinov2_attn.status()) == "nothing installed"


def test_a_module_without_source_may_have_attention(package, tmp_path):
    """Such as one that was compiled to machine code: nobody can read what it defines."""
    package({"__init__.py": "", "hidden.py": "x = 1"})
    hidden = tmp_path / "vit" / "hidden.py"
    py_compile.compile(str(hidden), str(hidden.with_suffix(".pyc")))
    hidden.unlink()
    importlib.invalidate_caches()
    with dinov2_attn.install("vit"):
        assert dinov2_attn.status().pending == ("vit",)


def test_a_package_that_is_taken_out_and_comes_again_is_awaited(package):
    """A module of it that stayed says nothing about what the package will import."""
    package({"__init__.py": "", "a.py": ""}, ("vit.a",))
    del sys.modules["vit"]
    with dinov2_attn.install("vit"):
        assert dinov2_attn.status().pending == ("vit",)


SOURCE = textwrap.dedent("""
    from torch import nn
    from torch.nn import functional as F

    class Attention(nn.Module):
        def __init__(self, dim, num_heads=8, qkv_bias=False):
            super().__init__()
            self.num_heads = num_heads
            self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

        def forward(self, x):
            batch, length, dim = x.shape
            split = self.qkv(x).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
            q, k, v = split.permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
""")


def test_a_package_of_a_longer_name_is_another(package, tmp_path):
    (tmp_path / "vit_tools").mkdir()
    (tmp_path / "vit_tools" / "__init__.py").write_text(SOURCE)
    package({"__init__.py": "", "layers.py": SOURCE})
    other = importlib.import_module("vit_tools")
    with dinov2_attn.install("vit"):
        assert dinov2_attn.status().pending == ("vit",)
        ours = importlib.import_module("vit.layers")
        status = dinov2_attn.status()
        assert status.grafted == ("vit.layers.Attention.forward",)
        assert status.pending == ()
        assert "vit_tools" not in str(status)
        assert not hasattr(other.Attention.forward, "__wrapped__")
        assert hasattr(ours.Attention.forward, "__wrapped__")
    assert not hasattr(ours.Attention.forward, "__wrapped__")


def test_nothing_is_said_of_a_package_that_is_refused_after_a_reload(package, tmp_path):
    """Its classes went by their kernel before, and now there is none."""
    other = SOURCE.replace("q, k, v =", "k, q, v =")
    package({"__init__.py": "", "layers.py": other}, ("vit.layers",))
    dinov2_attn.install("vit")
    assert list(dinov2_attn.status().at_kernel) == ["vit.layers.Attention"]
    hidden = other.replace("F.scaled_dot_product_attention(q, k, v)", "(q + k + v)")
    (tmp_path / "vit" / "layers.py").write_text(f"{hidden}# another size, so it is compiled anew")
    with pytest.raises(IncompatibleUpstreamError, match="to call one kernel"):
        importlib.reload(sys.modules["vit.layers"])
    status = dinov2_attn.status()
    assert (status.grafted, status.at_kernel) == ((), {})
    assert status.recognised["vit"].startswith("refused: ")
    dinov2_attn.uninstall()


def test_a_module_of_upstream_without_its_class_names_both():
    """Upstream moved it: a live model knows where to."""
    with upstreams.FIRST.imported_anew():
        del load().DinoVisionTransformer
        said = rf"(?s)class in {MODEL} with the structure of upstream's transformer.*Found none"
        with pytest.raises(IncompatibleUpstreamError, match=said):
            dinov2_attn.install()
        assert str(dinov2_attn.status()) == "nothing installed"


def test_models_that_go_by_one_name_are_numbered():
    """Their parts differ, so each is a target of its own."""
    module = load()
    handles, label = [], f"model with {MODEL}.DinoVisionTransformer"
    for i in range(3):
        model = module.DinoVisionTransformer(
            img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1, block_chunks=0
        )
        base = type(model.blocks[0].attn)
        forward = base.forward
        model.blocks[0].attn.__class__ = type(
            f"Own{i}", (base,), {"forward": lambda self, x, forward=forward: forward(self, x)}
        )
        handles.append(dinov2_attn.install(model))
    assert set(dinov2_attn.status().recognised) == {label, f"{label} (2)", f"{label} (3)"}
    for handle in handles:
        handle.uninstall()
    assert str(dinov2_attn.status()) == "nothing installed"


class Interrupted(nn.Module):
    """Ctrl-C comes while the proof builds it."""

    is_on = False

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__()
        if Interrupted.is_on:
            raise KeyboardInterrupt
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(nn.functional.softmax(self.qkv(x), -1).chunk(3, -1)[0])


def test_an_installation_that_is_interrupted_leaves_what_was_there(monkeypatch):
    model = load().DinoVisionTransformer(
        img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1, block_chunks=0
    )
    with dinov2_attn.install(model):
        before = dinov2_attn.status()
        other = nn.Sequential(model, Interrupted(4))
        other[0].blocks[0].attn = Interrupted(4)
        monkeypatch.setattr(Interrupted, "is_on", True)
        with pytest.raises(KeyboardInterrupt):
            dinov2_attn.install(other)
        assert dinov2_attn.status() == before
    assert str(dinov2_attn.status()) == "nothing installed"


def test_an_interrupted_installation_of_a_package_is_none(package, monkeypatch):
    package({"__init__.py": ""})
    vars(sys.modules["vit"])["Attention"] = Interrupted
    monkeypatch.setattr(Interrupted, "__module__", "vit")
    monkeypatch.setattr(Interrupted, "is_on", True)
    with pytest.raises(KeyboardInterrupt):
        dinov2_attn.install("vit")
    assert str(dinov2_attn.status()) == "nothing installed"
    assert not any("dinov2_attn" in type(finder).__module__ for finder in sys.meta_path)
