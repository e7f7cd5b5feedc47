"""Where the pictures of a training go: TensorBoard, Weights & Biases, the loggers of Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from dinov2_attn.errors import InvalidInputError


class Sink(Protocol):
    """Takes pictures."""

    def add(self, name: str, pixels: Any, step: int) -> None:
        """Keep ``pixels``, uint8 ``(H, W, 3)``."""


@dataclass(frozen=True)
class TensorBoard:
    """A ``SummaryWriter``, or what has its ``add_image``."""

    writer: Any

    def add(self, name: str, pixels: Any, step: int) -> None:
        """Keep ``pixels`` as an image of a step."""
        self.writer.add_image(name, pixels, global_step=step, dataformats="HWC")


@dataclass(frozen=True)
class Wandb:
    """A run of Weights & Biases.

    Pictures join the training's own next ``run.log``. With a step of their own they could be
    dropped: a run takes no step that is smaller than its last.
    """

    run: Any

    def add(self, name: str, pixels: Any, step: int) -> None:
        """Keep ``pixels`` for the next entry of the log."""
        import wandb

        self.run.log({name: wandb.Image(pixels, caption=f"step {step}")}, commit=False)


@dataclass(frozen=True)
class Lightning:
    """A logger of Lightning with ``log_image``, such as its ``WandbLogger``."""

    logger: Any

    def add(self, name: str, pixels: Any, step: int) -> None:
        """Keep ``pixels`` as an image of a step."""
        self.logger.log_image(key=name, images=[pixels], step=step, caption=[f"step {step}"])


def sinks_of(to: Any) -> list[Sink]:
    """Return where pictures go; raise ``InvalidInputError`` for what takes none."""
    given = to if isinstance(to, list | tuple) else [to]
    found = [sink for one in given if (sink := sink_of(one)) is not None]
    if len(found) == len(given) > 0:
        return found
    wrong = [type(one).__name__ for one in given if sink_of(one) is None]
    raise InvalidInputError(
        "a SummaryWriter, a run of Weights & Biases or a logger of Lightning that takes images",
        ", ".join(wrong) or "none",
        "Pass torch.utils.tensorboard.SummaryWriter(folder), or what wandb.init() returns.",
    )


def sink_of(one: Any) -> Sink | None:
    """Return the sink for a writer, a run or a logger; None if it takes no images."""
    if hasattr(one, "add_image"):
        return TensorBoard(one)
    if hasattr(one, "log_image"):
        return Lightning(one)
    if type(one).__module__.partition(".")[0] == "wandb" and hasattr(one, "log"):
        return Wandb(one)
    # TensorBoardLogger of Lightning and of Fabric holds a SummaryWriter.
    experiment = getattr(one, "experiment", None)
    return TensorBoard(experiment) if hasattr(experiment, "add_image") else None
