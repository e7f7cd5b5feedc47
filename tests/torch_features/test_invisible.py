"""What other threads and forked processes see of a model while one thread uses it: nothing."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import pickle
import signal
import threading
import traceback
from types import CodeType, FunctionType, ModuleType

import pytest
import torch
from torch import nn

import dinov2_attn
from dinov2_attn import attention_maps, edit, record
from dinov2_attn.errors import Dinov2AttnError, NotEditedError, NotRecordedError
from dinov2_attn.grafting.channel import ACTIVE, STATE, InstanceForward
from dinov2_attn.grafting.modules import ASKED
from dinov2_attn.grafting.registry import LOCK, REGISTRY
from tests.support.recordings import IMAGES, build
from tests.support.tolerances import assert_close, assert_same_bits

TRIES = 25
WHOLE = {} if torch.__version__ < "2.1" else {"weights_only": False}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, tokens):
        batch, length, width = tokens.shape
        query, key, value = self.qkv(tokens).reshape(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))

    def doubled(self, tokens):
        return Attention.forward(self, tokens * 2)


class Other(nn.Module):
    """No DINOv2. What cuts the images is PyTorch's own class, which other modules share."""

    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 2, 2)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.double()

    def forward(self, images):
        tokens = self.cut(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return tokens


def without_projections(tokens, factor):
    return nn.functional.scaled_dot_product_attention(tokens, tokens * factor, tokens)


def with_own_forward():
    """As some libraries wrap a module: by an attribute of the instance."""
    model = Other()
    model.layers[0].forward = functools.partial(without_projections, factor=2)
    return model


KINDS = {
    "DINOv2": lambda first: build(first),
    "other": lambda _: Other(),
    "in a Sequential": lambda _: nn.Sequential(Other()),
    "own forward": lambda _: with_own_forward(),
}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def uses(model):
    """Everything that looks into a pass of ``model``."""
    with record(model) as maps:
        model(IMAGES)
    assert maps[0].layers
    with edit(model, heads=0):
        model(IMAGES)
    for ask in (
        lambda: attention_maps(model, IMAGES),
        lambda: dinov2_attn.artifact_tokens(model, IMAGES),
        lambda: dinov2_attn.relevance(model, IMAGES, total, method="legrad"),
    ):
        try:
            ask()
        except Dinov2AttnError:
            continue  # not every model has tokens of this kind


def total(output):
    return output.flatten(1).sum(1)


class Meanwhile:
    """Another thread that uses a model all the time."""

    def __init__(self, act):
        self._act, self._stop, self.errors = act, threading.Event(), []
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            while not self._stop.is_set():
                self._act()
                self._begun.set()
        except BaseException as error:
            self.errors.append(error)
            self._begun.set()

    def __enter__(self):
        self._thread.start()
        self._begun.wait(60)
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert self.errors == []


@pytest.fixture(params=KINDS)
def model(request, first):
    return KINDS[request.param](first)


@pytest.mark.parametrize("installed", [False, True])
def test_copies_and_pickles_of_another_thread_are_as_ever(model, installed):
    if installed:
        dinov2_attn.install()
    before, output = saved(model), model(IMAGES)
    with Meanwhile(lambda: uses(model)):
        for _ in range(TRIES):
            assert saved(model) == before
            twin = copy.deepcopy(model)
            assert saved(twin) == before
            assert pickle.loads(pickle.dumps(model)).state_dict().keys() == twin.state_dict().keys()
            check_is_clean(twin)
    assert_same_bits(model(IMAGES), output)
    assert_same_bits(twin(IMAGES), output)


def check_is_clean(model):
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        for value in vars(module).values():
            assert not isinstance(value, InstanceForward)


def own_forwards(layer):
    return {
        "function": attention,
        "partial": functools.partial(without_projections, factor=2),
        "method": layer.doubled,
    }


@pytest.mark.parametrize("kind", ["function", "partial", "method"])
def test_a_module_with_its_own_forward_is_copied_and_read_without_ours(first, kind):
    """A plain function is the one thing that a pickle keeps in a shell, one of Python's own."""
    model, plain = Other(), Other()
    plain.load_state_dict(model.state_dict())
    for one in (model, plain):
        one.layers[0].forward = own_forwards(one.layers[0])[kind]
    own = model.layers[0].forward
    with record(model):
        model(IMAGES)
        twin, alone = copy.deepcopy(model), copy.copy(model.layers[0].forward)
        content = saved(model)
    assert alone is own
    copied = twin.layers[0].forward
    assert type(copied) is type(own)
    assert getattr(copied, "__self__", twin.layers[0]) is twin.layers[0]
    assert b"dinov2_attn" not in content
    read = torch.load(io.BytesIO(content), **WHOLE)
    for other in (model, twin, read):
        assert_same_bits(other(IMAGES), plain(IMAGES))


def attention(tokens):
    return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


def test_an_own_forward_keeps_its_signature_while_it_is_recorded(first):
    model = with_own_forward()
    inner = model.layers[0]
    own = inner.forward
    with record(model) as maps:
        model(IMAGES)
        assert inner.forward.__wrapped__ is own
    assert inner.forward is own
    assert len(maps) == 1


@pytest.mark.parametrize("layers", [["layers.0", "layers.1"], ["layers.1"], ["layers.0"]])
def test_modules_may_be_given_their_tokens_by_name(first, layers):
    class Named(Other):
        def forward(self, images):
            tokens = self.cut(images).flatten(2).transpose(1, 2)
            for layer in self.layers:
                tokens = tokens + layer(tokens=tokens)
            return tokens

    model = Named()
    model.layers[1].forward = functools.partial(without_projections, factor=2)
    expected = model(IMAGES)
    with record(model, layers) as maps:
        assert_same_bits(model(IMAGES), expected)
    assert maps[0].layers == tuple(layers)


def sequential():
    return nn.Sequential(Other(), nn.Identity())


@pytest.mark.parametrize("build_it", [Other, sequential])
def test_a_module_of_a_recorded_class_runs_as_ever_in_the_middle_of_a_pass(first, build_it):
    """Such as another model, or a Sequential of anybody."""
    model, other = build_it(), build_it()
    larger = torch.cat([IMAGES, IMAGES], -1)
    for layer in model.modules():
        if type(layer) is Attention:
            layer.register_forward_pre_hook(lambda *_: other(larger).sum() and None)
    with record(model) as maps:
        for _ in range(2):
            model(IMAGES)
            other(IMAGES)
    assert [one.grid for one in maps.passes] == [(2, 3), (2, 3)]
    for module in (model, other):
        assert "forward" not in vars(module)
        assert not hasattr(type(module).forward, "__wrapped__")


@contextlib.contextmanager
def open_elsewhere(model):
    """Recordings and edits of ``model`` that another thread has open, and does nothing in."""
    opened, done = threading.Event(), threading.Event()

    def hold():
        unused = contextlib.suppress(NotRecordedError, NotEditedError)
        with unused, record(model), edit(model, heads=0):
            opened.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    opened.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.skipif(torch.__version__ < "2.5", reason="export is younger than this torch")
def test_an_export_is_as_ever_while_another_thread_records(model):
    """It would not be if that ran the model: PyTorch patches modules of all threads."""
    expected = str(torch.export.export(model, (IMAGES,)).graph)
    with open_elsewhere(model):
        exported = torch.export.export(model, (IMAGES,))
    assert str(exported.graph) == expected
    assert_close(exported.module()(IMAGES), model(IMAGES))


# Fork


def in_a_child(act):
    """Return the exit status of a child that does ``act``; one that waits for ever has a signal."""
    child = os.fork()
    if child == 0:
        signal.alarm(15)
        status = 1
        try:
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_children(act, tries=TRIES):
    """Fork several times. PyTorch's own locks may be held once, by the other thread's pass."""
    found = [in_a_child(act) for _ in range(tries)]
    assert found.count(0) >= tries - 1
    assert set(found) <= {0, -signal.SIGALRM}


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_neither_waits_nor_records(model):
    def in_child():
        assert not ACTIVE.on
        assert not ACTIVE.edits
        dinov2_attn.status()
        assert list(REGISTRY) == []
        check_is_clean(model)
        model(IMAGES)
        with record(model) as maps:
            model(IMAGES)
        assert len(maps) == 1

    with Meanwhile(lambda: uses(model)):
        in_children(in_child)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_of_a_process_with_a_recording_records_its_own(model):
    def in_child():
        assert not ACTIVE.on
        model(IMAGES)
        with record(model) as maps:
            model(IMAGES)
        assert len(maps) == 1
        assert list(REGISTRY) == []

    with open_elsewhere(model):
        assert in_a_child(in_child) == 0


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_installs_while_a_thread_of_its_parent_installs(first):
    first.module(first.model)
    model = build(first)

    def install():
        dinov2_attn.install()
        dinov2_attn.status()
        dinov2_attn.uninstall()

    def in_child():
        with dinov2_attn.install():
            weights = model.get_last_self_attention(IMAGES)
        assert weights.shape[0] == len(IMAGES)
        dinov2_attn.uninstall()
        assert not hasattr(type(model), "get_last_self_attention")

    with Meanwhile(install):
        in_children(in_child, 5)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_thread_that_forks_keeps_its_own_recording_and_lock(first):
    model = Other()

    def in_child():
        for _ in range(3):
            model(IMAGES)
        assert len(maps) > 1

    with LOCK, record(model) as maps:
        model(IMAGES)
        assert in_a_child(in_child) == 0
    assert len(maps) == 1
    assert not ACTIVE.on


def refers_to(functions):
    """Return what a pickler writes beside ``functions`` where it writes their code.

    cloudpickle does so with the functions of classes that cannot be imported: those of a notebook.
    """
    waiting, seen, found = list(functions), [], []
    while waiting:
        function = waiting.pop()
        seen.append(function)
        codes, names = [function.__code__], set()
        while codes:
            code = codes.pop()
            names |= set(code.co_names)
            codes += [one for one in code.co_consts if isinstance(one, CodeType)]
        values = [function.__globals__.get(name) for name in names]
        values += [cell.cell_contents for cell in function.__closure__ or ()]
        for value in values:
            if not isinstance(value, FunctionType):
                found.append(value)
            elif "<locals>" in value.__qualname__ and not any(value is one for one in seen):
                waiting.append(value)
    return [value for value in found if not isinstance(value, ModuleType)]


def test_grafts_can_be_written_with_a_class_that_cannot_be_imported(first):
    model = build(first)
    first.module("dinov2.models.vision_transformer")
    with dinov2_attn.install(), record(model), edit(model, heads={0: [0]}):
        model(IMAGES)
        grafts = [graft.new for graft in REGISTRY if isinstance(graft.new, FunctionType)]
        assert len(grafts) > 5
        values = refers_to(grafts)
        for ours in (ACTIVE, STATE, ASKED):
            assert any(value is ours for value in values)
            assert pickle.loads(pickle.dumps(ours)) is ours
        for value in values:
            if isinstance(value, threading.local):
                assert pickle.loads(pickle.dumps(value)) is value
