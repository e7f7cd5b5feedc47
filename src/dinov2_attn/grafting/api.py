"""``install``, ``uninstall`` and ``status``.

Importing this module imports neither torch nor upstream. Both are imported when a class is
grafted.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

from dinov2_attn._compat_imports import wait_for_imports
from dinov2_attn.errors import (
    IncompatibleUpstreamError,
    InvalidInputError,
    in_one_line,
    shown,
    shown_name,
)
from dinov2_attn.grafting.import_hook import Finder
from dinov2_attn.grafting.registry import REGISTRY, RecordingTarget, locked
from dinov2_attn.grafting.targets import MODULES, LiveModel, Package
from dinov2_attn.history.projects import UPSTREAM

if TYPE_CHECKING:
    from torch import nn

    from dinov2_attn.backbone.structure import Role

_PACKAGES: dict[str, Package] = {}


@dataclass(frozen=True)
class _Outcome:
    """The classes of a target that go by their kernel or are left out, with the reasons."""

    at_kernel: dict[str, str]
    left_out: dict[str, str]


_OUTCOMES: dict[Hashable, _Outcome] = {}


def _graft_package(package: Package, arrived: ModuleType | None = None) -> None:
    with locked():
        # Another thread may have uninstalled it while this one waited.
        if _PACKAGES.get(package.name) is not package or not package.imported():
            return
        try:
            classes = list(package.classes(arrived))
            if classes or package.is_complete(arrived):
                _graft(package.name, classes, package.fallback)
            package.failure = None
        except Exception as error:  # status() reports it again
            package.failure = error
            raise


def _graft(
    target: Hashable,
    classes: list[tuple[type, Role]],
    fallback: bool,
    running: Collection[type] | None = None,
) -> None:
    from dinov2_attn.backbone.structure import name_of
    from dinov2_attn.grafting.modules import classes_at_kernel
    from dinov2_attn.grafting.transaction import graft_classes

    if not classes:
        raise IncompatibleUpstreamError(
            "attention modules with qkv, proj and num_heads, as DINOv2's have",
            f"none in {target}",
            "record(model) needs no install: it finds the attention of any model.",
        )
    _OUTCOMES.pop(target, None)
    left_out = graft_classes(REGISTRY, target, classes, fallback=fallback, running=running)
    at_kernel = classes_at_kernel(cls for cls, _ in classes if cls not in left_out)
    _OUTCOMES[target] = _Outcome(
        *({name_of(cls): why for cls, why in found.items()} for found in (at_kernel, left_out))
    )


def _arrived(module: ModuleType) -> None:
    for package in list(_PACKAGES.values()):
        if package.covers(module.__name__):
            _graft_package(package, module)


_FINDER = Finder(lambda name: any(p.covers(name) for p in list(_PACKAGES.values())), _arrived)


def _await_imports() -> None:
    """Keep the finder first on ``sys.meta_path`` while there is a package to wait for."""
    # Another thread may iterate over the list, which must always have the finder.
    if _PACKAGES and sys.meta_path[:1] != [_FINDER]:
        sys.meta_path.insert(0, _FINDER)
    for i in reversed(range(len(sys.meta_path))):
        if sys.meta_path[i] is _FINDER and (i or not _PACKAGES):
            del sys.meta_path[i]


def _remove(target: Hashable) -> None:
    with locked():
        REGISTRY.release(target)
        if isinstance(target, str):
            _PACKAGES.pop(target, None)
        _OUTCOMES.pop(target, None)
        _await_imports()


def _finish_imports(package: Package) -> None:
    """Wait for modules that another thread is importing, without holding our lock.

    The finder is in place, so it sees every import that begins from now on.
    """
    wait_for_imports(package.covers)
    for name in package.imported():
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # the thread that began the import raises it; the module is still pending


@dataclass(frozen=True)
class Status:
    """What is installed. ``str()`` is for people.

    Attributes:
        grafted: Every graft in force.
        covered: Grafts with another patch on top.
        pending: Modules that will be grafted when they are imported.
        recognised: For each target, how its code was recognised, or why it was not.
        at_kernel: The classes whose weights are taken at their kernel, each with the reason. Those
            of all others are computed from their projection.
        left_out: The classes that were not grafted, each with the reason.

    """

    grafted: tuple[str, ...]
    covered: tuple[str, ...]
    pending: tuple[str, ...]
    recognised: dict[str, str] = field(hash=False)
    at_kernel: dict[str, str] = field(hash=False, default_factory=dict)
    left_out: dict[str, str] = field(hash=False, default_factory=dict)

    def __str__(self) -> str:
        lines = [f"grafted: {name}" for name in self.grafted]
        lines += [f"patched on top by other code: {name}" for name in self.covered]
        lines += [f"pending, until imported: {name}" for name in self.pending]
        lines += [f"{target}: {how}" for target, how in self.recognised.items()]
        lines += [f"weights at the kernel: {name}: {why}" for name, why in self.at_kernel.items()]
        lines += [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        return shown("\n".join(lines)) or "nothing installed"


class Handle:
    """What ``install`` returns. It undoes that installation.

    The end of a ``with`` block restores the state before ``install``, so a target that was
    installed before stays installed. ``uninstall()`` removes the target in any case.
    """

    def __init__(self, target: Hashable, restore: Callable[[], None]) -> None:
        self._target = target
        self._restore = restore

    def __repr__(self) -> str:
        return f"<dinov2_attn installed on {shown_name(self._target)}>"

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def uninstall(self) -> None:
        """Remove the grafts of this target. Nothing happens if they are removed already."""
        _remove(self._target)


def install(target: str | nn.Module | None = None, *, fallback: bool = True) -> Handle:
    """Graft ``return_attention`` onto DINOv2's own classes, in place and reversibly.

    Every class is proved on a small instance in float64 first. The weights of a class whose
    attention is not softmax(q kᵀ · scale) of its own projection are taken at its kernel. A class
    without a kernel is left out, see ``status``. Modules that are imported are
    grafted now, all others at every import and reload. A second call changes nothing. No random
    number is drawn.

    It waits for modules of the package that another thread is importing.

    Args:
        target: None for upstream's package ``dinov2``, ``"dinov3"``, the name of a package that
            vendors a copy, or a live model.
        fallback: Whether PyTorch's kernel runs if xFormers can be imported and has no kernel for
            the device (any CPU). One ``KernelFallbackWarning`` is shown. Without it upstream's
            own call of xFormers raises.

    Returns:
        The handle that undoes the installation.

    Raises:
        IncompatibleUpstreamError: If no attention class calls a kernel that can be seen. Then
            nothing is grafted. If a package is not imported yet, its import raises it.
        InvalidInputError: If ``target`` is anything else.

    """
    if target is None:
        target = UPSTREAM
    if isinstance(target, str) and target:
        return _install_package(Package(target, MODULES.get(target, {})), fallback)
    torch = sys.modules.get("torch")  # a live model has imported it
    if torch is not None and isinstance(target, torch.nn.Module):
        return _install_model(target, fallback)
    raise InvalidInputError(
        "None, the name of a package or a live model (torch.nn.Module)",
        f"{target!r} of type {type(target).__name__}",
        'Call install(), install("some.vendored.package") or install(model).',
    )


def uninstall() -> None:
    """Remove every graft. Each class has the same function objects again as before.

    Raises:
        PatchedOnTopError: If another patch is on top of a graft. Then nothing is undone.

    """
    with locked():
        REGISTRY.release_all()
        _PACKAGES.clear()
        _OUTCOMES.clear()
        _await_imports()


@contextmanager
def restored() -> Iterator[None]:
    """Uninstall at the end the packages that were installed inside only."""
    before = set(_PACKAGES)
    try:
        yield
    finally:
        for name in set(_PACKAGES) - before:
            _remove(name)


def status() -> Status:
    """Return what is grafted, what is pending and how each target was recognised."""
    with locked():
        grafts = [graft for graft in REGISTRY if not graft.only_records]
        targets = {target for graft in grafts for target in graft.targets}
        targets = {target for target in targets if not isinstance(target, RecordingTarget)}
        recognised: dict[str, str] = {}
        for target in sorted(targets, key=str):
            recognised[_unused(str(target), recognised)] = _recognise(target)
        failed = {
            p.name: f"refused: {in_one_line(p.failure)}" for p in _PACKAGES.values() if p.failure
        }
        return Status(
            grafted=tuple(str(graft) for graft in grafts if graft.in_force),
            covered=tuple(str(graft) for graft in grafts if not graft.in_force),
            pending=tuple(
                name for p in _PACKAGES.values() for name in p.pending(p.name in targets)
            ),
            recognised={**recognised, **failed},
            at_kernel=_merged(outcome.at_kernel for outcome in _OUTCOMES.values()),
            left_out=_merged(outcome.left_out for outcome in _OUTCOMES.values()),
        )


def _merged(reasons: Iterable[dict[str, str]]) -> dict[str, str]:
    return {name: why for some in reasons for name, why in some.items()}


def _unused(label: str, taken: Mapping[str, str]) -> str:
    """Return ``label``, numbered where models go by one name: of an older class, of other parts."""
    names = (label if i == 1 else f"{label} ({i})" for i in itertools.count(1))
    return next(name for name in names if name not in taken)


def _recognise(target: Hashable) -> str:
    from dinov2_attn.grafting.modules import classes_at_kernel
    from dinov2_attn.history.identify import is_known, recognise

    grafts = [graft for graft in REGISTRY if target in graft.targets]
    owners = dict.fromkeys(graft.owner for graft in grafts if isinstance(graft.owner, type))
    at_kernel = classes_at_kernel(owners)
    proved = [c for c in owners if c not in at_kernel or is_known(REGISTRY.original, c)]
    return recognise(REGISTRY.original, proved) or "weights are taken at the kernel"


def _install_package(package: Package, fallback: bool) -> Handle:
    before = _PACKAGES.get(package.name)
    restore = partial(_remove, package.name)
    if before is not None:
        package, restore = before, partial(_switch_package, before, before.fallback)
    try:
        with locked():
            package = _PACKAGES.setdefault(package.name, package)
            package.fallback = fallback
            _await_imports()
        _finish_imports(package)
        _graft_package(package)
    except BaseException:
        restore()
        raise
    return Handle(package.name, restore)


def _install_model(model: nn.Module, fallback: bool) -> Handle:
    from dinov2_attn.backbone.structure import classes_behind, name_of, running_attention

    classes = list(classes_behind(model))
    if not classes:
        raise IncompatibleUpstreamError(
            "a model with attention modules (qkv, proj, num_heads) inside",
            f"none in {name_of(type(model))}",
            "Pass DINOv2 itself or a model that contains it. record(model) needs no install: it "
            "finds the attention of any model.",
        )
    label = f"model with {name_of(classes[-1][0])}"
    target = LiveModel(label, frozenset(cls for cls, _ in classes))
    restore = partial(_remove, target)
    try:
        with locked():
            before = [graft for graft in REGISTRY if target in graft.targets]
            if before:
                former = any(graft.is_kernel for graft in before)
                restore = partial(_switch_model, target, classes, former)
            _graft(target, classes, fallback, running_attention(model))
        return Handle(target, restore)
    except KeyboardInterrupt:  # any other error has undone what it did
        restore()
        raise


def _switch_package(package: Package, fallback: bool) -> None:
    if package.fallback != fallback:
        package.fallback = fallback
        _graft_package(package)


def _switch_model(target: LiveModel, classes: list[tuple[type, Role]], fallback: bool) -> None:
    with locked():
        if any(
            target in graft.targets for graft in REGISTRY
        ):  # it may have been uninstalled meanwhile
            _graft(target, classes, fallback)
