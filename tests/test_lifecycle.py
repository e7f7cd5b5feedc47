"""Invariants 6 and 7: identity restored in any order of events, nothing left behind on failure."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import re
import sys
import textwrap
import threading
import time
import types
import warnings
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dinov2_attn
import upstreams
from dinov2_attn.surgery.ledger import Ledger
from dinov2_attn.surgery.targets import UPSTREAM_MODULES
from dinov2_attn.upstream.source import DINOV2_WHEEL
from dinov2_attn.upstream.wheel import fetch_wheel
from fresh import python
from strategies import noise

ATTENTION, BLOCK, MODEL = UPSTREAM_MODULES
METHODS = ("get_self_attention", "get_last_self_attention", "get_last_selfattention")


@pytest.fixture(autouse=True)
def _clean():
    dinov2_attn.uninstall()
    yield
    dinov2_attn.uninstall()


def purge():
    for name in [m for m in sys.modules if m.partition(".")[0] == "dinov2"]:
        del sys.modules[name]


def load():
    return upstreams.FIRST.module(MODEL)


def reload():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream warns at every import without xFormers
        for name in UPSTREAM_MODULES:
            importlib.reload(upstreams.FIRST.module(name))


def classes():
    attention, block = upstreams.FIRST.module(ATTENTION), upstreams.FIRST.module(BLOCK)
    parts = [attention.Attention, attention.MemEffAttention, block.Block, block.NestedTensorBlock]
    return [*parts, load().DinoVisionTransformer]


def contents(types):
    """Everything that the classes hold, by identity."""
    return [dict(vars(cls)) for cls in types]


def is_grafted(cls):
    return "return_att" in str(inspect.signature(cls.forward))


def small_model(module):
    return module.DinoVisionTransformer(
        img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1, block_chunks=0
    )


def asks(module):
    return small_model(module).get_last_self_attention(noise(1, 3, 4, 4, seed=0)).shape[-1] == 5


def test_uninstall_puts_back_the_very_same_objects():
    types = classes()
    before = contents(types)
    handle = dinov2_attn.install()
    assert contents(types) != before
    handle.uninstall()
    after = contents(types)
    assert all(a.keys() == b.keys() for a, b in zip(before, after, strict=True))
    assert all(a[k] is b[k] for a, b in zip(before, after, strict=True) for k in a)
    handle.uninstall()  # a second time nothing happens
    dinov2_attn.uninstall()


STEPS = ["install", "import", "purge", "reload", "uninstall", "install model"]


@given(st.lists(st.sampled_from(STEPS), max_size=7))
def test_any_order_of_events(steps):
    """After every step: installed and imported means grafted, anything else means untouched."""
    dinov2_attn.uninstall()
    purge()
    seen = {}  # every class ever met, with what it held when it was met ungrafted
    installed = False
    for step in steps:
        if step == "install":
            dinov2_attn.install()
            installed = True
        elif step == "uninstall":
            dinov2_attn.uninstall()
            installed = False
        elif step == "import":
            load()
        elif step == "purge":
            purge()
        elif step == "reload" and ATTENTION in sys.modules:
            reload()
        elif step == "install model" and MODEL in sys.modules:
            model = small_model(sys.modules[MODEL])
            with dinov2_attn.install(model):
                assert model.get_self_attention(noise(1, 3, 4, 4, seed=0))
        if MODEL in sys.modules:
            types = classes()
            assert {is_grafted(cls) for cls in types} == {installed}
            assert hasattr(types[-1], METHODS[0]) == installed
            seen.update(zip(types, contents(types), strict=True) if not installed else ())
        status = dinov2_attn.status()
        assert status.covered == ()
        assert not status.grafted or installed
        assert status.grafted or not (installed and MODEL in sys.modules)
        missing = [n for n in UPSTREAM_MODULES if n not in sys.modules]
        assert status.pending == (tuple(missing) if installed else ())
    dinov2_attn.uninstall()
    for cls, held in seen.items():
        assert dict(vars(cls)) == held
    assert not any("dinov2_attn" in type(f).__module__ for f in sys.meta_path)


def test_installing_twice_is_installing_once():
    first = dinov2_attn.install()
    grafts = contents(classes())
    second = dinov2_attn.install()
    assert contents(classes()) == grafts
    assert len(dinov2_attn.status().grafted) == len(set(dinov2_attn.status().grafted))
    second.uninstall()
    assert dinov2_attn.status().grafted == ()
    first.uninstall()
    assert str(dinov2_attn.status()) == "nothing installed"


def test_a_with_block_restores_what_it_found():
    with dinov2_attn.install() as handle:
        assert repr(handle) == "<dinov2_attn installed on dinov2>"
        with dinov2_attn.install():
            assert asks(load())
        assert asks(load())
    assert not hasattr(load().DinoVisionTransformer, METHODS[0])
    with pytest.raises(KeyError), dinov2_attn.install():
        raise KeyError
    assert dinov2_attn.status().grafted == ()


def test_a_graft_needed_twice_stays_until_the_last_one_leaves():
    model = small_model(load())
    package, live = dinov2_attn.install(), dinov2_attn.install(model)
    package.uninstall()
    assert model.get_self_attention(noise(1, 3, 4, 4, seed=0))
    assert dinov2_attn.status().pending == ()
    live.uninstall()
    assert not hasattr(model, METHODS[0])


def test_what_somebody_patched_on_top_is_not_undone():
    block = upstreams.FIRST.cls("Block")
    before = contents(classes())
    dinov2_attn.install()
    ours = block.forward
    block.forward = theirs = lambda self, x: ours(self, x)
    with pytest.raises(dinov2_attn.PatchedOnTop, match=r"expected .*Block\.forward; found <func"):
        dinov2_attn.uninstall()
    assert block.forward is theirs
    assert is_grafted(upstreams.FIRST.cls("Attention"))  # nothing at all was undone
    assert dinov2_attn.status().covered == (f"{BLOCK}.Block.forward",)
    dinov2_attn.install()  # idempotent even so
    assert block.forward is theirs
    block.forward = ours
    dinov2_attn.uninstall()
    assert contents(classes()) == before


def test_what_somebody_patched_below_comes_back():
    block = upstreams.FIRST.cls("Block")
    upstream = block.forward

    def theirs(self, x):
        return upstream(self, x)

    theirs.mark = "theirs"
    block.forward = theirs
    said = r"but for Block\.forward \(of test_lifecycle\)"
    try:
        with pytest.warns(dinov2_attn.UpstreamDrift, match=said):
            handle = dinov2_attn.install()
        with handle:
            assert block.forward is not theirs
            assert not hasattr(block.forward, "mark")
            assert asks(load())
        assert block.forward is theirs
    finally:
        block.forward = upstream


def test_what_somebody_has_undone_already_is_no_patch_on_top():
    """Their patch below, our graft, their undo: pytest's monkeypatch ends in that order."""
    block = upstreams.FIRST.cls("Block")
    upstream = block.forward
    before = contents(classes())

    def theirs(self, x):
        return upstream(self, x)

    block.forward = theirs
    with pytest.warns(dinov2_attn.UpstreamDrift):
        dinov2_attn.install()
    block.forward = theirs  # put back what they remember
    assert dinov2_attn.status().covered == (f"{BLOCK}.Block.forward",)
    with pytest.warns(dinov2_attn.UpstreamDrift):
        dinov2_attn.install()
    assert block.forward is not theirs  # grafted anew, not left bare
    assert asks(load())
    block.forward = theirs
    dinov2_attn.uninstall()
    assert block.forward is theirs
    block.forward = upstream
    assert contents(classes()) == before


def test_two_models_of_one_class_are_two_targets_where_their_parts_differ():
    base = upstreams.FIRST.cls("MemEffAttention")

    class Right(base):
        def forward(self, x):
            return super().forward(x)

    class Wrong(base):
        def forward(self, x):
            return super().forward(x.flip(1))

    good, right, wrong = (small_model(load()) for _ in range(3))
    right.blocks[0].attn, wrong.blocks[0].attn = Right(4, num_heads=1), Wrong(4, num_heads=1)
    images = noise(1, 3, 4, 4, seed=0)
    first = dinov2_attn.install(good)
    with pytest.raises(dinov2_attn.IncompatibleUpstream):
        dinov2_attn.install(wrong)
    assert good.get_last_self_attention(images).shape[-1] == 5  # the failure undid its own only
    second = dinov2_attn.install(right)
    first.uninstall()
    assert right.get_last_self_attention(images).shape[-1] == 5
    second.uninstall()
    assert dinov2_attn.status().grafted == ()


def test_a_failure_under_somebody_elses_patch_is_the_error_that_is_raised():
    """A reload brings code that is refused, while another graft cannot be undone."""
    dinov2_attn.install()
    block, attention = upstreams.FIRST.cls("Block"), upstreams.FIRST.cls("Attention")
    ours = block.forward
    block.forward = lambda self, x: ours(self, x)

    class Wrong(attention):
        def forward(self, x):
            return super().forward(x.flip(1))

    Wrong.__module__ = ATTENTION
    module = upstreams.FIRST.module(ATTENTION)
    module.Wrong = Wrong
    try:
        with pytest.raises(dinov2_attn.IncompatibleUpstream):
            dinov2_attn.install()
        assert not is_grafted(Wrong)
    finally:
        del module.Wrong
        block.forward = ours


def test_a_package_with_nothing_to_graft_stays_pending():
    with dinov2_attn.install("json"):
        assert dinov2_attn.status().pending == ("json",)


def test_odd_entries_among_the_modules_do_no_harm():
    sys.modules["odd"] = types.SimpleNamespace(__name__="odd")
    try:
        with dinov2_attn.install("odd"):
            assert dinov2_attn.status().grafted == ()
    finally:
        del sys.modules["odd"]


def test_a_watched_module_can_be_looked_at():
    load()
    dinov2_attn.install()
    del sys.modules[ATTENTION]
    spec = importlib.util.find_spec(ATTENTION)
    assert "class Attention" in spec.loader.get_source(ATTENTION)


def test_an_installation_waits_for_an_import_under_way(tmp_path, monkeypatch):
    """Begun before the finder was there, it would be missed by it."""
    slow = tmp_path / "slow_vit"
    slow.mkdir()
    attention = inspect.getsource(upstreams.FIRST.module(ATTENTION))
    (slow / "__init__.py").write_text("")
    (slow / "attention.py").write_text(f"{attention}\nimport time; time.sleep(1)\n")
    monkeypatch.syspath_prepend(tmp_path)

    def begin():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of later revisions, without xFormers
            importlib.import_module("slow_vit.attention")

    thread = threading.Thread(target=begin)
    thread.start()
    for _ in range(1000):
        if "slow_vit.attention" in sys.modules:
            break
        time.sleep(0.01)
    with dinov2_attn.install("slow_vit"):
        assert is_grafted(sys.modules["slow_vit.attention"].Attention)
    thread.join()


def test_a_failing_check_leaves_nothing_behind():
    """A block that attends to something else: the attention grafted before it goes as well."""
    before, block = contents(classes()), upstreams.FIRST.cls("Block")
    upstream = block.forward
    block.forward = lambda self, x: x + self.attn(x)
    try:
        with pytest.raises(dinov2_attn.IncompatibleUpstream):
            dinov2_attn.install()
    finally:
        block.forward = upstream
    assert contents(classes()) == before
    assert str(dinov2_attn.status()) == "nothing installed"
    assert not any("dinov2_attn" in type(f).__module__ for f in sys.meta_path)
    with dinov2_attn.install():  # and the next installation works
        assert asks(load())


def test_status_says_what_is_pending_and_what_is_there():
    purge()
    dinov2_attn.install()
    assert dinov2_attn.status().pending == tuple(UPSTREAM_MODULES)
    assert f"pending, until imported: {BLOCK}" in str(dinov2_attn.status())
    load()
    status = dinov2_attn.status()
    assert status.pending == ()
    assert {f"{MODEL}.DinoVisionTransformer.{name}" for name in METHODS} < set(status.grafted)
    (how,) = status.recognised.values()
    assert re.fullmatch(r"attention and blocks as in .*, verified; models as in .*, verified", how)


def test_a_reload_grafts_the_new_classes_and_live_models_keep_the_old():
    purge()
    dinov2_attn.install()
    old = small_model(load())
    reload()
    new = small_model(load())
    assert type(old) is not type(new)
    images = noise(1, 3, 4, 4, seed=0)
    assert old.get_last_self_attention(images).shape == new.get_last_self_attention(images).shape
    dinov2_attn.uninstall()
    assert not hasattr(old, METHODS[0])
    assert not hasattr(new, METHODS[0])


def test_classes_from_before_a_reload_are_found_by_a_later_installation():
    """dinov2.layers still exports the old blocks, and models are built of those."""
    purge()
    load()
    reload()
    old = load().Block
    assert old is not upstreams.FIRST.cls("NestedTensorBlock")
    with dinov2_attn.install():
        assert is_grafted(old)
        assert asks(load())
    assert not is_grafted(old)


def test_the_module_is_as_it_would_be_without_the_finder():
    purge()
    plain = load()
    loader, spec = type(plain.__loader__), plain.__spec__
    purge()
    dinov2_attn.install()
    watched = load()
    assert type(watched.__loader__) is type(watched.__spec__.loader) is loader
    assert watched.__spec__.origin == spec.origin
    assert inspect.getsource(watched.BlockChunk).startswith("class")


def test_threads_that_import_and_install_at_once():
    for _ in range(5):
        purge()
        failures = []

        def do(job, failures=failures):
            try:
                job()
            except BaseException as error:
                failures.append(error)

        jobs = [dinov2_attn.install, load, dinov2_attn.install, load, dinov2_attn.status]
        threads = [threading.Thread(target=do, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads)
        assert failures == []
        assert asks(load())
        dinov2_attn.uninstall()


def test_another_finder_that_delegates_does_not_go_round_in_circles():
    class Delegating:
        def find_spec(self, name, path=None, target=None):
            for finder in sys.meta_path:
                if finder is not self and (spec := finder.find_spec(name, path, target)):
                    return spec
            return None

    purge()
    other = Delegating()
    dinov2_attn.install()
    sys.meta_path.insert(0, other)
    try:
        assert asks(load())
    finally:
        sys.meta_path.remove(other)


def test_the_ledger_knows_absence_and_who_needs_what():
    class Upstream:
        def old(self):
            return "old"

    ledger, old = Ledger(), vars(Upstream)["old"]
    ledger.set(Upstream, "old", lambda self: "first", "a")
    ledger.set(Upstream, "new", lambda self: "new", "b")
    assert ledger.keep(Upstream, "old", "b")
    assert not ledger.keep(Upstream, "newer", "b")
    assert not ledger.keep(int, "old", "b")
    ledger.release("a")  # needed by b as well
    assert Upstream().old() == "first"
    ledger.release("b")
    assert vars(Upstream)["old"] is old
    assert not hasattr(Upstream, "new")
    assert list(ledger) == []


def test_the_ledger_rolls_back_what_is_new_after_somebody_elses_undo():
    """Dropping an entry that was undone must not hide the one that takes its place."""

    class Upstream:
        def old(self):
            return "old"

    ledger, old = Ledger(), vars(Upstream)["old"]
    ledger.set(Upstream, "old", lambda self: "first", "a")
    Upstream.old = old
    before = list(ledger)
    assert not ledger.keep(Upstream, "old", "a")
    ledger.set(Upstream, "old", lambda self: "second", "a")
    ledger.roll_back(before)
    assert vars(Upstream)["old"] is old
    assert list(ledger) == []


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


@pytest.mark.parametrize("order", list(itertools.permutations(["install", "hub", "torch"])))
def test_torch_hub_is_reached_in_every_order(tmp_path, order):
    """torch.hub.load puts the repository on the path for a moment and imports it from there."""
    with zipfile.ZipFile(fetch_wheel(DINOV2_WHEEL)) as wheel:
        wheel.extractall(tmp_path)
    (tmp_path / "hubconf.py").write_text(
        "def tiny():\n"
        "    from dinov2.models.vision_transformer import DinoVisionTransformer\n"
        "    return DinoVisionTransformer(img_size=4, patch_size=2, embed_dim=4, depth=1,\n"
        "                                 num_heads=1, block_chunks=0)\n"
    )
    code = """
        import sys
        def hub():
            import torch
            return torch.hub.load(sys.argv[1], "tiny", source="local")
        for step in sys.argv[2:]:
            if step == "torch":
                import torch
            elif step == "install":
                import dinov2_attn
                dinov2_attn.install()
            else:
                model = hub()
        model = model if "model" in globals() else hub()
        print(*model.get_last_self_attention(torch.rand(1, 3, 4, 6)).shape)
        print(hub().get_self_attention(torch.rand(1, 3, 4, 6))[0].shape[-1])
        dinov2_attn.uninstall()
        print(hasattr(model, "get_self_attention"))
    """
    assert run_fresh(tmp_path, code, tmp_path, *order) == ["1", "1", "7", "7", "7", "False"]


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
        images, expected = torch.load(sys.argv[1] + "/expected.pt")
        print(torch.equal(model(images), expected), "dinov2_attn" in sys.modules)
    """
    assert run_fresh(tmp_path, code, tmp_path, path) == ["True", "False"]
