"""``lightning_callback``: an ``AttentionLogger`` as a callback of Lightning."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from typing import Any

from torch import nn

from dinov2_attn._imports import is_installed
from dinov2_attn.apps.training.logger import AttentionLogger
from dinov2_attn.apps.training.sinks import sink_of
from dinov2_attn.errors import InvalidInputError, UnavailableError

log = logging.getLogger(__name__)

# The two names under which Lightning is installed.
PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def lightning_callback(images: Any, *, to: Any = None, every: int = 500, **options: Any) -> Any:
    """Return a callback of Lightning that logs attention maps of fixed images.

    >>> callback = lightning_callback(["cat.jpg"], every=500, backbone="student")
    >>> Trainer(callbacks=[callback], logger=TensorBoardLogger("runs")).fit(module, loader)

    It works for ``lightning`` and for ``pytorch_lightning``. Pictures are those of
    ``AttentionLogger``, at the beginning and every ``every`` optimizer steps. The first process
    alone draws. Wrong arguments raise when the training begins, and later failures only warn.

    Args:
        images: As for ``AttentionLogger``.
        to: As there. By default the loggers of the trainer that take images.
        every: How many optimizer steps lie between pictures.
        **options: ``backbone``, ``layers``, ``queries``, ``heads``, ``name`` and ``style`` of
            ``AttentionLogger``.

    Returns:
        A ``Callback``.

    Raises:
        UnavailableError: If Lightning is not installed.

    """
    return _callback_class()(images, to, every, options)


class _Hooks:
    """What the callback does. The class of Lightning comes behind it in the callback's bases."""

    def __init__(self, images: Any, to: Any, every: int, options: dict[str, Any]) -> None:
        super().__init__()
        self._given = images, to, every, options
        self._logger: AttentionLogger | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made here, so that pickle finds it nowhere.
        images, to, every, options = self._given
        return functools.partial(lightning_callback, images, to=to, every=every, **options), ()

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Check the arguments, and draw the first pictures."""
        if not trainer.is_global_zero:
            return
        images, to, every, options = self._given
        to = _loggers_of(trainer) if to is None else to
        self._logger = AttentionLogger(pl_module, images, to, every=every, **options)
        self._logger(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Draw if it is time."""
        if self._logger is not None:
            self._logger(trainer.global_step)

    def on_train_end(self, *_: Any) -> None:
        """Forget the model."""
        self._logger = None


def _loggers_of(trainer: Any) -> list[Any]:
    loggers = [logger for logger in trainer.loggers if sink_of(logger) is not None]
    if not loggers:
        names = ", ".join(type(logger).__name__ for logger in trainer.loggers)
        raise InvalidInputError(
            "a logger of Lightning that takes images",
            names or "none",
            "Pass Trainer(logger=TensorBoardLogger(folder)) or WandbLogger(), or to= a writer.",
        )
    return loggers


@functools.cache
def _made_of(*bases: type) -> type[Any]:
    return type("AttentionCallback", (_Hooks, *bases), {"__module__": __name__})


def _callback_class() -> type[Any]:
    """Return the class of callbacks, for each Lightning that this process has imported."""
    loaded = [name for name in PACKAGES if sys.modules.get(name) is not None] or _installed()[:1]
    if not loaded:
        raise UnavailableError(
            "the library lightning",
            "neither lightning nor pytorch_lightning in this environment",
            "Install it with `pip install 'dinov2-attn[training]'`.",
        )
    return _made_of(*(importlib.import_module(name).Callback for name in loaded))


def _installed() -> list[str]:
    return [name for name in PACKAGES if is_installed(name.partition(".")[0])]
