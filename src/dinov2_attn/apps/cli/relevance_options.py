"""The options of relevance: what is explained, and by which method."""

from __future__ import annotations

import argparse
from argparse import ArgumentTypeError
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli.argtypes import Options, check_register
from dinov2_attn.apps.cli.model_options import Loaded
from dinov2_attn.apps.viz.tokens import check_queries
from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.math.token_names import position_of, read_token

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.images import LoadedImage
    from dinov2_attn.maps.relevance import Relevance

# Those of maps/relevance.py, the default first. That module imports torch.
METHODS = ("chefer", "gradient_rollout", "attention_gradient", "legrad")


def add_options(group: Options) -> None:
    """Add ``--target`` and ``--method`` to ``group``."""
    group.add_argument(
        "--target",
        type=target,
        metavar="CLASS",
        help="Show as well which patches made this target: the number of a class, where the model "
        "has a classifier, or a token whose similarity to CLS is explained: register:2, 3,17 or "
        "'#17'.",
    )
    group.add_argument(
        "--method",
        choices=METHODS,
        help=f"How patches are related to --target. Default: {METHODS[0]}.",
    )


def target(text: str) -> str:
    """Return ``text`` if it is the number of a class, or a token other than CLS."""
    if text.isdecimal() and len(text) < 10:
        return text
    try:
        token = read_token(text)
    except InvalidInputError as error:
        raise ArgumentTypeError(
            f"expected the number of a class from 0 on, or a token; found {text!r}. Try 281 for a "
            "class, or 3,17 for a patch."
        ) from error
    if token in ("cls", 0):
        raise ArgumentTypeError(
            "expected a token other than CLS, to which it is compared; found CLS. Try 3,17."
        )
    check_register(text)
    return text


def check(args: argparse.Namespace, loaded: Loaded | None = None) -> None:
    """Raise what is wrong for every image, first of all what needs no model.

    Raises:
        InvalidInputError: If there is a method without a target, or no classifier for a class.
        OutOfRangeError: If the model has no such register or class.

    """
    if args.target is None:
        if args.method is not None:
            raise InvalidInputError(
                "--method together with --target",
                f"--method {args.method} alone",
                "Say what to explain: --target 281 for a class, --target 3,17 for a patch.",
            )
        return
    if loaded is None:
        return
    if not args.target.isdecimal():
        check_queries([args.target], loaded.registers)
        return
    if loaded.classifier is None:
        raise InvalidInputError(
            "a model with a classifier, for the number of a class",
            f"--target {args.target} for {loaded.name}, which has none",
            "Choose one such as --model dinov2_vits14_lc or timm:vit_small_patch16_224, or explain "
            "a token: --target 3,17.",
        )
    classes = classes_of(loaded.classifier)
    if classes is not None and int(args.target) >= classes:
        raise OutOfRangeError(
            f"a class from 0 to {classes - 1}", args.target, "Classes count from 0."
        )


def classes_of(classifier: Any) -> int | None:
    """Return the number of classes of ``classifier``, None if it does not tell."""
    linear = getattr(classifier, "linear", None)
    found = getattr(classifier, "num_classes", getattr(linear, "out_features", None))
    return found if isinstance(found, int) else None


def relevance_of(
    loaded: Loaded, image: LoadedImage, rows: list[int], args: argparse.Namespace
) -> Relevance:
    """Return the relevance of the tokens ``rows`` of an image for ``--target``, on the CPU.

    Raises:
        OutOfRangeError: If the image has no such patch.
        InvalidInputError: If the model cannot be run on the image, or the target does not depend
            on its tokens.

    """
    from dinov2_attn.apps.viz.heatmap import run
    from dinov2_attn.maps.relevance import relevance
    from dinov2_attn.maps.targets import token_similarity

    method: Any = args.method or METHODS[0]
    model: Any = loaded.model
    wanted: Any
    if args.target.isdecimal():
        model, wanted = loaded.classifier, int(args.target)
    else:
        token = read_token(args.target)
        wanted = token_similarity(position_of(token, 1 + loaded.registers, loaded.grid(image)))
        model = of_tokens(model)
    queries: Any = "cls" if method == "legrad" else rows
    found: Relevance = run(
        lambda images: relevance(model, images, wanted, method, queries=queries),
        image,
        args.device,
    )
    return found


def of_tokens(model: Any) -> Any:
    """Return what returns the tokens ``(B, N, C)`` of a timm model; a DINOv2 as it is."""
    from torch import nn

    from dinov2_attn.backbone.backbone import transformers_in

    if transformers_in(model) or not hasattr(model, "forward_features"):
        return model

    class OfTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, images: Any) -> Any:
            return self.inner.forward_features(images)

    return OfTokens()
