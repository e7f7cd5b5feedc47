"""The options that choose a model, and the model they choose, for every subcommand."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli.argtypes import add_source_and_device, positive
from dinov2_attn.apps.cli.model_names import TIMM, architecture, chosen, model_name
from dinov2_attn.apps.weights import dinov3
from dinov2_attn.apps.weights.models import (
    ARCHS,
    HUB,
    PUBLISHED,
    Architecture,
    build,
    build_like,
    caption,
)
from dinov2_attn.errors import InvalidInputError, UnavailableError

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.images import LoadedImage
    from dinov2_attn.maps.geometry import Geometry

log = logging.getLogger(__name__)

SEED = 0
NO_MEANING = "RANDOM WEIGHTS: the maps of this run carry no meaning"


@dataclass(frozen=True)
class Loaded:
    """A model on its device, and what is known of it.

    Attributes:
        model: The model, grafted if it is one of upstream's.
        name: What captions call it.
        random: Whether its weights are random, so that its maps mean nothing.
        doubt: A sentence about what was assumed of it.
        mean: The mean that its images had in training, if it names one.
        std: Their deviation.
        classifier: What returns logits ``(B, classes)``, with the model inside, if there is any.

    """

    model: Any
    name: str
    random: bool
    doubt: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classifier: Any = None

    @property
    def geometry(self) -> Geometry:
        """The size of its patches, and the number of channels, tokens, layers and heads."""
        from dinov2_attn.maps.geometry import geometry_of

        return geometry_of(self.model)

    @property
    def registers(self) -> int:
        """The number of registers."""
        return self.geometry.registers

    @property
    def patch(self) -> int:
        """The side of a patch in pixels."""
        return self.geometry.patch_size[0]

    def grid(self, image: LoadedImage) -> tuple[int, int]:
        """Return the rows and columns of patches of an image."""
        height, width = image.picture.shape[:2]
        return self.geometry.grid(height, width)

    @property
    def warning(self) -> str | None:
        """What has to travel with each picture, if anything has."""
        from dinov2_attn.apps.viz.text import NO_MEANING

        return NO_MEANING if self.random else self.doubt


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--arch``, ``--weights`` and the like to ``parser``."""
    group = parser.add_argument_group("the model")
    weights = group.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights",
        metavar="PATH",
        help="A checkpoint, from which the architecture is read: a file by torch.save or "
        "safetensors, a folder of Hugging Face's or timm's, or a name in Hugging Face's cache. "
        "Default: the published weights.",
    )
    weights.add_argument(
        "--random-weights",
        action="store_true",
        help="Use random weights, for a trial run. The maps carry no meaning.",
    )
    group.add_argument(
        "--model",
        type=model_name,
        metavar="NAME",
        help="The model by its name on Meta's hub, such as "
        f"{', '.join(HUB)} or dinov3_vits16, one of timm's as timm:NAME, or demo, a small one that "
        "ships with this package. One of DINOv2 with _lc behind it, such as dinov2_vits14_lc, has "
        "a classifier of ImageNet's classes. "
        "Default: dinov2_vits14, unless other options say more.",
    )
    group.add_argument(
        "--arch",
        type=architecture,
        metavar="{" + ",".join((*ARCHS, *dinov3.ARCHS)) + "}",
        help="The architecture. Default: that of --weights, or else vit_small. One of DINOv3 "
        "needs --repo, a checkout of DINOv3, and --weights.",
    )
    group.add_argument(
        "--registers", action="store_true", help="Use the published model with 4 registers."
    )
    group.add_argument(
        "--patch-size",
        type=positive,
        metavar="N",
        help="The patch size in pixels. Default: that of --weights, or else 14.",
    )
    group.add_argument(
        "--num-heads",
        type=positive,
        metavar="N",
        help="The number of heads of --weights, if a head does not have 64 features.",
    )
    group.add_argument(
        "--key",
        metavar="NAME",
        help="Which of several models in --weights to use, such as student or model_ema. "
        "Default: the teacher, or else a moving average.",
    )
    add_source_and_device(group)


def load_model(args: argparse.Namespace) -> Loaded:
    """Return the grafted model that the options of ``add_options`` describe, on its device.

    With ``--weights`` the checkpoint says what model it is, and options that say otherwise
    are errors. Raises ``InvalidInputError``, ``UnavailableError`` and ``UnreadableFileError``.
    """
    import torch

    args = chosen(args)
    check_device(args.device)
    if args.model_is_timm:
        return _of_timm(args)
    is_dinov3 = args.model_is_dinov3
    choose = _of_dinov3 if is_dinov3 else _named if args.weights is None else _from_file
    choice = choose(args)
    if torch.device(args.device).type == "cpu":
        # xFormers has no kernel for it, and upstream would call one wherever xFormers imports.
        sys.modules.setdefault("xformers", None)  # type: ignore[arg-type]  # Python's own sign
    obtain = _obtain_dinov3 if is_dinov3 else _obtain
    obtain(args.repo)
    model, classifier = _seeded(lambda: _with_classifier(choice))
    model.to(args.device)
    if classifier is not None:
        classifier.to(args.device)
    return Loaded(model, choice.name, args.random_weights, choice.doubt, classifier=classifier)


def _with_classifier(choice: Choice) -> tuple[Any, Any]:
    model = choice.make()
    return model, None if choice.classifier is None else choice.classifier(model)


def _seeded(make: Callable[[], Any]) -> Any:
    """Return what ``make`` makes, with the same random weights at every run."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        return make()


def _of_timm(args: argparse.Namespace) -> Loaded:
    """Return a model of timm's with its own weights, those of a file, or random ones."""
    from dinov2_attn.apps.weights import timm_models

    name = args.model.removeprefix(TIMM)
    if args.random_weights:
        log.warning(NO_MEANING)
    make = partial(
        timm_models.build, name, None if args.weights is None else Path(args.weights),
        pretrained=not args.random_weights,
    )  # fmt: skip
    model = _seeded(make)
    source = "random weights" if args.random_weights else "timm's weights"
    source = source if args.weights is None else Path(args.weights).name
    mean, std = timm_models.normalisation(model)
    called = f"{name} of timm, {source}"
    classifier = model if getattr(model, "num_classes", 0) else None
    found = Loaded(model.to(args.device), called, args.random_weights, None, mean, std, classifier)
    found.geometry  # noqa: B018 - raises if it has no attention or no patches
    return found


def _obtain(repo: str | None) -> None:
    import dinov2_attn
    from dinov2_attn.apps.weights.source import obtain

    log.debug("%s", obtain(repo))
    dinov2_attn.install()


def _obtain_dinov3(repo: str | None) -> None:
    import dinov2_attn

    dinov3.obtain(repo)
    dinov2_attn.install("dinov3")


@dataclass(frozen=True)
class Choice:
    """A model that is made once upstream's code is there.

    Attributes:
        make: Makes it.
        name: What captions call it.
        doubt: A sentence about what was assumed of it.
        classifier: Makes its classifier from it, or returns ``None``.

    """

    make: Callable[[], Any]
    name: str
    doubt: str | None = None
    classifier: Callable[[Any], Any] | None = None


def _named(args: argparse.Namespace) -> Choice:
    """Choose a model by name: of published weights or of random ones."""
    arch, patch_size = args.arch or "vit_small", args.patch_size or 14

    def make() -> Any:
        from dinov2_attn.apps.weights.source import load_pretrained

        model = build(arch, patch_size=patch_size, registers=args.registers)
        if args.random_weights:
            log.warning(NO_MEANING)
        else:
            load_pretrained(model, arch, patch_size=patch_size, registers=args.registers)
        return model

    def classifier(model: Any) -> Any:
        from dinov2_attn.apps.weights.classifiers import of_hub

        name = args.classifier.removesuffix("_reg")
        return of_hub(model, name, registers=args.registers, random=args.random_weights)

    called = caption(PUBLISHED[arch][0], patch_size, 4 if args.registers else 0)
    called = f"{called}, {'random' if args.random_weights else 'published'} weights"
    return Choice(make, called, None, classifier if args.classifier else None)


def _of_dinov3(args: argparse.Namespace) -> Choice:
    """Choose a model of DINOv3 by its name, with weights of a file or with random ones."""
    if args.weights is None and not args.random_weights:
        raise UnavailableError(
            "a file with weights of DINOv3, which are not downloaded here because of their licence",
            "none",
            "Get them from Meta, then name the file: --weights PATH. --random-weights runs "
            "without, but its maps mean nothing.",
        )

    def make() -> Any:
        from dinov2_attn.apps.weights.checkpoints import load_checkpoint

        model = dinov3.build(args.arch)
        if args.random_weights:
            log.warning(NO_MEANING)
        else:
            load_checkpoint(model, args.weights, key=args.key)
        return model

    source = "random weights" if args.weights is None else Path(args.weights).name
    return Choice(make, f"DINOv3 {dinov3.PUBLISHED[args.arch]}, {source}")


def _from_file(args: argparse.Namespace) -> Choice:
    """Choose the model whose weights are in a file. It is read first: that needs no network."""
    from dinov2_attn.apps.weights.architecture import doubt, infer
    from dinov2_attn.apps.weights.checkpoints import fill
    from dinov2_attn.apps.weights.classifiers import of_checkpoint
    from dinov2_attn.apps.weights.reading import read

    checkpoint = read(args.weights)
    architecture = infer(checkpoint, args.num_heads, key=args.key)
    _require_agreement(args, architecture)
    log.debug("%s: %s", args.weights, architecture)
    if doubt(architecture):
        log.warning("%s: %s", args.weights, doubt(architecture))
    if architecture.registers and architecture.interpolation is None:
        log.debug(
            "positions are interpolated as in the published models with registers (antialias, "
            "no offset): weights do not tell"
        )

    def make() -> Any:
        model = build_like(architecture)
        fill(model, checkpoint, key=args.key)
        return model

    assumed = f", heads assumed: {architecture.num_heads}" if architecture.heads_assumed else ""
    called = f"{architecture}, {Path(args.weights).name}{assumed}"
    return Choice(make, called, doubt(architecture), lambda model: of_checkpoint(model, checkpoint))


def _require_agreement(args: argparse.Namespace, found: Architecture) -> None:
    """Raise ``InvalidInputError`` if an option contradicts the file."""
    agree = {
        f"--arch {args.arch}": args.arch is None or PUBLISHED[args.arch][0] == found.family,
        f"--patch-size {args.patch_size}": args.patch_size in (None, found.patch_size),
        "--registers, which are 4": not args.registers or found.registers == 4,
    }
    if args.model is not None:
        same = all(agree.values()) and bool(args.registers) == bool(found.registers)
        agree = {f"--model {args.model}": same}
    contradicted = [option for option, agrees in agree.items() if not agrees]
    if contradicted:
        raise InvalidInputError(
            f"{', '.join(contradicted)}, as given",
            f"{args.weights}, which holds {found}",
            "Leave the options out: the file states them.",
        )


def check_device(name: str) -> None:
    """Raise ``InvalidInputError`` unless torch can use the device called ``name``."""
    import torch

    try:
        torch.empty(1, device=name).cpu()  # nothing comes back from the meta device
    except Exception as error:  # a torch without CUDA asserts, one without hpu imports in vain
        reason = str(error).partition("\n")[0]
        raise InvalidInputError(
            "a device that this torch can use", f"{name!r} ({reason})", "Try --device cpu."
        ) from error
