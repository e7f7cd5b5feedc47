"""How weights leave a forward pass: receivers of a thread take the kernel call of each module.

A graft on an attention class asks the receivers of its thread whether they want the module's
kernel call. If so, its forward runs under a ``Capture``. Nothing is projected twice, and nothing is
set on a module. Graphs go another way: see asked.py.
"""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from itertools import islice
from types import FunctionType
from typing import Any, Protocol, TypeVar
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn

from dinov2_attn._compat import (
    constant_in_graphs,
    grad_mode_kept,
    is_compiling,
    is_foreign_thread,
    is_in_backward,
    is_tracing,
    is_transformed,
)
from dinov2_attn._locks import Life, fork_safe_lock
from dinov2_attn.backbone.structure import looks_like_attention, name_of
from dinov2_attn.errors import NotEditedError, NotRecordedError
from dinov2_attn.grafting.registry import LOCK, REGISTRY, Owner, RecordingTarget, locked
from dinov2_attn.kernels.call import KernelCall
from dinov2_attn.kernels.capture import Capture, Change, StopPassError, check_calls
from dinov2_attn.kernels.edited import EditedProduct, Pattern
from dinov2_attn.kernels.xformers import KERNEL, graft_captured_kernel, kernel_homes
from dinov2_attn.typing import Forward

T = TypeVar("T")


class Receiver(Protocol):
    """What the grafts call during a forward pass of a thread. Subclasses may leave methods out."""

    @property
    def stops(self) -> bool:
        """Whether the next ``take`` comes before the kernel, and the pass ends after it."""

    def begin(self, entrance: nn.Module, images: Tensor) -> None:
        """Note that ``entrance`` is given ``images (B, C, H, W)``, with which a pass begins."""
        return  # for those who need no images

    def wants(self, attention: nn.Module) -> bool:
        """Return whether to call ``take`` when ``attention`` runs."""

    def take(self, attention: nn.Module, call: KernelCall) -> Change | None:
        """Keep what the kernel of ``attention`` was given. May change what it returned."""

    def failed(self, module: nn.Module) -> None:
        """Note that ``module``, a whole model or an entrance, has raised an exception."""
        return  # for those who count layers

    def left(self, module: nn.Module) -> None:
        """Note that ``module``, a whole model or an entrance, has returned."""
        return  # for those who count layers


class Editor(Protocol):
    """What changes the weights that kernels use in a thread."""

    @property
    def replaces(self) -> bool:
        """Whether no row keeps the output of the kernel."""
        return False

    @property
    def is_of_recording(self) -> bool:
        """Whether it belongs to a recording, so that questions inside are not edited."""
        return False

    @property
    def is_checked(self) -> bool:
        """Whether its first call of a module is proved as it is."""
        return True

    def begin(self, entrance: nn.Module, images: Tensor) -> None:
        """Note that ``entrance`` is given ``images (B, C, H, W)``, with which a pass begins."""
        return  # for those who need no images

    def wants(self, attention: nn.Module) -> bool:
        """Return whether to call ``edit`` when ``attention`` runs."""

    def edit(self, attention: nn.Module, pattern: Pattern) -> Pattern:
        """Return the pattern that ``attention`` is to use."""

    def stopped(self) -> None:
        """Note that a pass is ended before its last layer."""
        return  # for those who count no layers


class _State(threading.local):
    """The receivers and the editors in this thread: usually none."""

    def __reduce__(self) -> str:
        # Some picklers write a class that is nowhere to import with its functions, and what those
        # refer to: ours too, where the class is grafted.
        return "STATE"

    def __init__(self) -> None:
        # On the instance from the start, in every thread: Dynamo guards on their presence too.
        self.receivers: tuple[Receiver, ...] = ()
        self.editors: tuple[Editor, ...] = ()


STATE = _State()


class _Active:
    """Whether any thread has a receiver: what the grafts check first.

    Every Dynamo can guard a plain attribute. Those of torch before 2.4 take None and empty values
    on a ``threading.local`` for true, so a graph must not read that without need.
    """

    def __init__(self) -> None:
        self.on = False
        self.edits = False  # whether any thread has an editor
        self._users: WeakSet[Life] = WeakSet()
        self._lock = fork_safe_lock()

    def __reduce__(self) -> str:
        return "ACTIVE"  # as in _State

    @contextmanager
    def active(self) -> Iterator[None]:
        """Keep it on inside, for this thread and so for all."""
        if is_tracing():  # a graph must restore the state, and cannot take a lock
            before, self.on = self.on, True
            try:
                yield
            finally:
                self.on = before
            return
        life = Life()
        try:
            with self._lock:
                self._users.add(life)
                self.on = True
            yield
        finally:
            self._leave(life)

    def _leave(self, *gone: Life) -> None:
        with self._lock:
            self._users.difference_update(gone)
            self.on = bool(self._users)

    def leave_others(self) -> None:
        """Forget the users in other threads, after a fork."""
        self._leave(*(life for life in self._users if not life.is_here))


ACTIVE = _Active()


# What was entered in this context: an asyncio task has one of its own.
_ENTERED: ContextVar[tuple[object, ...]] = ContextVar("dinov2_attn_entered", default=())
# The lives of what was not left yet, by whichever thread or context.
_ALIVE: WeakValueDictionary[int, Life] = WeakValueDictionary()


@contextmanager
def _entered(one: object) -> Iterator[None]:
    """Bind ``one`` to this context, until its block is left from anywhere."""
    life = Life()
    try:
        _ALIVE[id(one)] = life
        _ENTERED.set((*_ENTERED.get(), one))
        yield
    finally:
        _ALIVE.pop(id(one), None)
        _ENTERED.set(tuple(other for other in _ENTERED.get() if other is not one))


def _receivers() -> tuple[Receiver, ...]:
    """Return the receivers that were entered in this context and not left since."""
    return _here(STATE.receivers, 0)


def _editors() -> tuple[Editor, ...]:
    """Return the editors that were entered in this context and not left since."""
    return _here(STATE.editors, 1)


def _here(given: tuple[T, ...], place: int) -> tuple[T, ...]:
    if not given:
        return given
    if is_compiling():
        pairs = zip(given, _alive()[place], strict=True)
        return tuple(one for one, alive in pairs if alive)
    entered = set(map(id, _ENTERED.get()))
    return tuple(one for one in given if id(one) in entered and id(one) in _ALIVE)


@constant_in_graphs
def _alive() -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Return which receivers and editors of this thread were not left, for a graph.

    It can read neither a context nor weak references. Another thread leaves a block by closing its
    generator: then the block is in this thread's list until the next one is entered.
    """
    receivers = tuple(id(one) in _ALIVE for one in STATE.receivers)
    return receivers, tuple(id(one) in _ALIVE for one in STATE.editors)


@contextmanager
def receiving(receiver: Receiver) -> Iterator[None]:
    """Give ``receiver`` the kernel calls of this context inside, beside those who have them.

    The context is that of ``contextvars`` in this thread. So a task of asyncio has what it entered
    itself and what was entered where it was made. A generator shares that of its caller.
    """
    try:
        with _entered(receiver), ACTIVE.active():
            STATE.receivers = (*(one for one in STATE.receivers if id(one) in _ALIVE), receiver)
            yield
    finally:
        STATE.receivers = tuple(other for other in STATE.receivers if other is not receiver)


@contextmanager
def unrecorded() -> Iterator[tuple[Receiver, ...]]:
    """Record nothing that runs inside. Yields the receivers that are set aside."""
    receivers, editors = STATE.receivers, STATE.editors
    try:
        STATE.receivers = ()
        STATE.editors = tuple(one for one in editors if not one.is_of_recording)
        yield receivers
    finally:
        STATE.receivers, STATE.editors = receivers, editors


@contextmanager
def unedited() -> Iterator[None]:
    """Edit nothing that runs inside."""
    before = STATE.editors
    try:
        STATE.editors = ()
        yield
    finally:
        STATE.editors = before


def unpacked() -> AbstractContextManager[object]:
    """Hide the tensors saved for the backward of the weights from surrounding hooks.

    Activation checkpointing counts the tensors that a block saves. Its second run does not ask
    for weights.
    """
    # A graph has no such hooks inside, nor has what torch.func differentiates.
    if not torch.is_grad_enabled() or is_transformed():
        return nullcontext()
    # Detached: a softmax saves its own result, which would hold itself alive through its graph.
    return torch.autograd.graph.saved_tensors_hooks(torch.detach, lambda saved: saved)


# Attention modules whose weights were proved in a pass.
_PROVED: WeakSet[nn.Module] = WeakSet()


def prove_once(attention: nn.Module, call: KernelCall, name: str) -> bool:
    """Prove the first call of ``attention``, and return whether it was proved now.

    A call without an output, or whose kernel drops weights, is proved another time.

    Raises:
        UnfaithfulError: If its weights are not those of the kernel.

    """
    if attention in _PROVED or call.output is None or call.dropout:
        return False
    call.check(name)
    _PROVED.add(attention)
    return True


def graft_captured(original: Forward) -> Forward:
    """Let the ``forward`` of an attention class give its kernel call to receivers."""

    @functools.wraps(original, updated=())
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if ACTIVE.on and (STATE.receivers or ACTIVE.edits):
            return run_captured(original, self, args, kwargs)
        return original(self, *args, **kwargs)

    return forward


def graft_captured_list(original: Forward) -> Forward:
    """Let the ``forward_list`` of an attention class give the kernel call of each tensor."""

    @functools.wraps(original, updated=())
    def forward_list(self: nn.Module, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if ACTIVE.on and (STATE.receivers or ACTIVE.edits) and isinstance(tensors, list | tuple):
            return run_captured(original, self, (tensors, *args), kwargs, calls=len(tensors))
        return original(self, tensors, *args, **kwargs)

    return forward_list


def _begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell receivers of the images that ``module`` is given."""
    if is_in_backward():  # checkpointing runs it again
        return
    given = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 3)
    for images in islice(given, 1):
        for receiver in _receivers():
            receiver.begin(module, images)
        for editor in _editors():
            editor.begin(module, images)


def graft_given_images(original: Forward) -> Forward:
    """Let a ``forward`` that is given images tell receivers when it begins and when it returns.

    It is that of a whole model or of what cuts images into patches, which may be the same module.
    """

    @functools.wraps(original, updated=())
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not ACTIVE.on or is_compiling():
            return original(self, *args, **kwargs)
        _begin(self, args, kwargs)
        try:
            output = original(self, *args, **kwargs)
        except BaseException as error:
            if not isinstance(error, StopPassError):
                for receiver in _receivers():
                    receiver.failed(self)
            raise
        for receiver in _receivers():
            receiver.left(self)
        return output

    return forward


def run_captured(
    original: Forward,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calls: int = 1,
) -> Any:
    """Run ``original`` on an attention ``module``, and give its kernel calls to receivers.

    Editors change their weights before. There is one call, or one for each tensor of a list.
    Nothing inside is recorded or edited: the graft of the base class runs for the same module, and
    a receiver may run models itself.

    Raises:
        NotRecordedError: If there were not so many ``calls`` of a kernel, or the pass becomes a
            graph.
        NotEditedError: If an edited pass becomes a graph.

    """
    wanting = [receiver for receiver in _receivers() if receiver.wants(module)]
    editing = _editors_of(module)
    if not (wanting or editing):
        return original(module, *args, **kwargs)
    if is_transformed():
        raise in_a_graph() if wanting else edited_in_a_graph()
    if is_in_backward():  # what checkpointing runs again is edited again
        wanting = []
    stops = bool(wanting) and all(receiver.stops for receiver in wanting)
    if stops:
        for editor in _editors():
            editor.stopped()

    def take(call: Any) -> Change | None:
        with unpacked():
            changes = [receiver.take(module, call) for receiver in wanting]
        return _one_after_the_other([change for change in changes if change is not None])

    # Not unrecorded() and unedited(): this runs in each layer, and contexts take microseconds.
    before = STATE.receivers, STATE.editors
    try:
        STATE.receivers, STATE.editors = (), ()
        if not (wanting or editing):
            return original(module, *args, **kwargs)
        # The first time all of it runs, to see that there is one call, and what it returns.
        early = stops and module in _PROVED
        edit = partial(_edited, module, editing) if editing else None
        capture = Capture(module, take, stops=early, edit=edit)
        try:
            with capture:
                output = original(module, *args, **kwargs)
        finally:
            capture.leave()
    finally:
        STATE.receivers, STATE.editors = before
    # Code that only looks like attention is left out; a module with its projections is not.
    if capture.calls != calls and (capture.calls or looks_like_attention(module)):
        check_calls(capture.calls, name_of(type(module)), calls)
    if stops:
        raise StopPassError
    return output


def _one_after_the_other(changes: Sequence[Change]) -> Change | None:
    def change(output: Tensor) -> Tensor:
        with unpacked():
            return functools.reduce(lambda made, one: one(made), changes, output)

    return change if changes else None


def _edited(
    module: nn.Module, editors: list[Editor], pattern: Pattern, original: Callable[[], Tensor]
) -> Pattern:
    """Return ``pattern`` as ``editors`` change it, one after the other.

    The first call of a module is proved as it is, so that editors are given its true weights.
    """
    is_proved = module in _PROVED or isinstance(pattern, EditedProduct)
    is_proved = is_proved or not any(one.is_checked for one in editors)
    if not is_proved and not pattern.base.dropout:  # another run would draw other numbers
        # Checkpointing counts what is saved for the backward pass, and proves nothing again.
        with torch.no_grad() if all(one.replaces for one in editors) else nullcontext():
            output = original()
        prove_once(module, replace(pattern.base, output=output), name_of(type(module)))
    for editor in editors:
        pattern = editor.edit(module, pattern)
    return pattern


def in_a_graph() -> NotRecordedError:
    """Return the error for a recording that a graph would not repeat."""
    return NotRecordedError(
        "a forward pass in eager mode inside record(...)",
        "one that torch.compile, torch.export or torch.func makes another function of, whose "
        "values end with it",
        "Run the eager module: compiled._orig_mod(images), or compiled(images) under "
        'torch.compiler.set_stance("force_eager"). Run exported and transformed models outside of '
        "record(...).",
    )


def edited_in_a_graph() -> NotEditedError:
    """Return the error for an edit that a graph would not repeat, or keep for ever."""
    return NotEditedError(
        "a forward pass in eager mode inside edit(...)",
        "one that torch.compile, torch.export or torch.func makes another function of, which "
        "would not see where the edit ends",
        "Run the eager module: compiled._orig_mod(images), or compiled(images) under "
        'torch.compiler.set_stance("force_eager"). Outside of edit(...) the graph runs as before.',
    )


Graft = Callable[[Forward], Forward]

# DINOv3's blocks call this method of their attention in training with stochastic depth.
LIST = "forward_list"


@contextmanager
def editing(
    editor: Editor, attentions: Iterable[nn.Module], entrances: Iterable[nn.Module] = ()
) -> Iterator[None]:
    """Let ``editor`` change the weights of ``attentions`` in this context.

    Args:
        editor: Changes them, after editors that are there already.
        attentions: The attention modules.
        entrances: Modules that are given the images of a pass.

    """
    with _grafts(attentions, entrances), ACTIVE.active(), _entered(editor), _known(editor):
        try:
            STATE.editors = (*(one for one in STATE.editors if id(one) in _ALIVE), editor)
            yield
        finally:
            STATE.editors = tuple(other for other in STATE.editors if other is not editor)


def is_edited_here() -> bool:
    """Return whether an editor was entered in this context."""
    return bool(_editors())


# The editors of all threads, each with its thread.
_EDITORS: list[tuple[int, Editor]] = []


@contextmanager
def _known(editor: Editor) -> Iterator[None]:
    """Let threads of autograd find ``editor`` inside."""
    try:
        with LOCK:
            _EDITORS.append((threading.get_ident(), editor))
            _note_editors()
        yield
    finally:
        with LOCK:
            _note_editors(editor)


def _note_editors(gone: Editor | None = None) -> None:
    """Keep the editors whose block was not left, without the one that is ``gone``."""
    _EDITORS[:] = [one for one in _EDITORS if one[1] is not gone and id(one[1]) in _ALIVE]
    ACTIVE.edits = bool(_EDITORS)


def _editors_of(module: nn.Module) -> list[Editor]:
    """Return the editors of ``module`` in this thread.

    The backward pass of a GPU runs in a thread of its own, where checkpointing runs modules again.
    It has the editors of the one thread that edits the module.
    """
    editors: Iterable[Editor] = _editors()
    if not editors and not is_compiling() and is_in_backward() and is_foreign_thread():
        with LOCK:
            found = [(thread, editor) for thread, editor in _EDITORS if editor.wants(module)]
        editors = [editor for _, editor in found] if len({i for i, _ in found}) == 1 else ()
    return [editor for editor in editors if editor.wants(module)]


@contextmanager
def recording(
    receiver: Receiver,
    attentions: Iterable[nn.Module],
    entrances: Iterable[nn.Module] = (),
    wholes: Iterable[nn.Module] = (),
) -> Iterator[None]:
    """Give ``receiver`` the kernel calls of ``attentions`` in this context.

    Args:
        receiver: Takes the calls.
        attentions: The attention modules.
        entrances: Modules that are given the images of a pass.
        wholes: Modules whose return ends a pass.

    """
    with _grafts(attentions, entrances, wholes), receiving(receiver):
        yield


@contextmanager
def _grafts(
    attentions: Iterable[nn.Module],
    entrances: Iterable[nn.Module] = (),
    wholes: Iterable[nn.Module] = (),
) -> Iterator[None]:
    """Have the grafts on the classes of these modules inside."""
    life, attentions = Life(), list(attentions)
    target = RecordingTarget(life)
    try:
        with locked():
            REGISTRY.begin(target)
            _set_grafts(target, attentions, entrances, wholes)
        with grad_mode_kept():
            yield
    finally:
        with locked():
            REGISTRY.release(target)


def _set_grafts(
    target: RecordingTarget,
    attentions: list[nn.Module],
    entrances: Iterable[nn.Module],
    wholes: Iterable[nn.Module],
) -> None:
    for graft, modules in (
        (graft_captured, attentions),
        (graft_given_images, (*entrances, *wholes)),
    ):
        for module in modules:
            _graft(module, graft, target)
    for cls in {type(module) for module in attentions if hasattr(module, LIST)}:
        if not REGISTRY.claim(cls, LIST, target):
            REGISTRY.set(cls, LIST, graft_captured_list(getattr(cls, LIST)), target)
    for home in kernel_homes():
        if not REGISTRY.claim(home, KERNEL, target):
            REGISTRY.set(home, KERNEL, graft_captured_kernel(home[KERNEL]), target)


def _graft(module: nn.Module, graft: Graft, target: RecordingTarget) -> None:
    owner: Owner = vars(module) if _is_its_own(module) else type(module)
    if REGISTRY.claim(owner, "forward", target):
        return
    if isinstance(owner, dict):
        own = module.forward  # bound, or a function without self
        REGISTRY.set(owner, "forward", InstanceForward(module, graft(_with_self(own)), own), target)
    else:
        REGISTRY.set(owner, "forward", graft(owner.forward), target)  # type: ignore[attr-defined]


def _is_its_own(module: nn.Module) -> bool:
    """Return whether the class of ``module`` does not decide what runs."""
    return "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule)


def _with_self(forward: Forward) -> Forward:
    def of_self(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return of_self


class InstanceForward:
    """The graft of a module that has a ``forward`` of its own, which copies and pickles keep.

    A copy gets what was there before. In a pickle stands what stood there before too, so that
    reading it needs no code of ours.
    """

    def __init__(self, module: nn.Module, forward: Forward, own: Callable[..., Any]) -> None:
        self._module, self._forward, self._own = module, forward, own
        functools.update_wrapper(self, own, updated=())  # its signature and name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self._module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._own, memo)

    def __copy__(self) -> Any:
        return self._own

    def __reduce_ex__(self, protocol: Any) -> Any:
        if isinstance(self._own, FunctionType):
            return partial, (self._own,)  # functions have no such method
        return self._own.__reduce_ex__(protocol)


def _forget_other_threads() -> None:
    """Drop, in a forked process, what belongs to threads that do not exist there."""
    for key, life in list(_ALIVE.items()):
        if not life.is_here:
            del _ALIVE[key]
    ACTIVE.leave_others()
    _note_editors()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
