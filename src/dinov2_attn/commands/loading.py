"""The options that choose a model, and the model they choose, for every subcommand."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass
from typing import Any

from dinov2_attn.commands.values import positive
from dinov2_attn.errors import InvalidInput
from dinov2_attn.upstream.models import ARCHS, build

log = logging.getLogger(__name__)

SEED = 0


@dataclass(frozen=True)
class Loaded:
    """A grafted model on its device, what captions call it, and whether it means nothing."""

    model: Any
    name: str
    random: bool


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--arch``, ``--weights`` and the like to ``parser``."""
    group = parser.add_argument_group("the model")
    group.add_argument("--arch", choices=ARCHS, default="vit_small", help="default: vit_small")
    group.add_argument("--registers", action="store_true", help="the model with 4 registers")
    group.add_argument("--patch-size", type=positive, default=14, metavar="N", help="default: 14")
    weights = group.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights", metavar="PATH", help="a state dict; default: the published weights"
    )
    weights.add_argument(
        "--random-weights", action="store_true", help="a trial run: maps carry no meaning"
    )
    group.add_argument("--repo", metavar="PATH", help="a checkout of facebookresearch/dinov2")
    group.add_argument("--device", default="cpu", help="torch's name of it, default: cpu")


def load_model(args: argparse.Namespace) -> Loaded:
    """Return the grafted model that the options of ``add_options`` describe, on its device.

    Raises ``InvalidInput``, ``Unavailable`` and ``UnreadableFile``.
    """
    import torch

    import dinov2_attn
    from dinov2_attn.upstream.checkpoints import load_pretrained, load_weights
    from dinov2_attn.upstream.source import obtain

    check_device(args.device)
    if torch.device(args.device).type == "cpu":
        # xFormers has no kernel for it, and upstream would call one wherever xFormers imports.
        sys.modules.setdefault("xformers", None)  # type: ignore[arg-type]  # Python's own sign
    log.info("%s", obtain(args.repo))
    dinov2_attn.install()
    kind = {"patch_size": args.patch_size, "registers": args.registers}
    # Seeded, so that random weights are the same at every run.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        model = build(args.arch, **kind)
    if args.random_weights:
        log.warning("RANDOM WEIGHTS: the maps of this run carry no meaning")
    elif args.weights is not None:
        load_weights(model, args.weights)
    else:
        load_pretrained(model, args.arch, **kind)
    name = f"{args.arch}/{args.patch_size}" + (", 4 registers" if args.registers else "")
    return Loaded(model.to(args.device), name, args.random_weights)


def check_device(name: str) -> None:
    """Raise ``InvalidInput`` unless torch can use the device called ``name``."""
    import torch

    try:
        torch.empty(1, device=name).cpu()  # nothing comes back from the meta device
    except Exception as error:  # a torch without CUDA asserts, one without hpu imports in vain
        reason = str(error).partition("\n")[0]
        raise InvalidInput(
            "a device that this torch can use", f"{name!r} ({reason})", "Try --device cpu."
        ) from error
