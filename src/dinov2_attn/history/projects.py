"""The projects whose history is known: which functions the grafts rely on, and where they are.

Of DINOv3, whose licence is Meta's DINOv3 License, this holds names and no code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

# The name of upstream's package.
UPSTREAM = "dinov2"

ATTENTION, BLOCKS, MODELS = "attention", "blocks", "models"


@dataclass(frozen=True, eq=False)
class Project:
    """A project, and the code in it that decides what the grafts return.

    Attributes:
        package: The name of its package.
        table: The file with its eras, in this folder.
        address: Its repository.
        licence: The licence of its code if it is no open-source licence, or ``""``.
        relied_on: By file and class, the functions that are grafted, and what they call between
            the tokens and the kernel. The constructors of blocks and models are left out: options
            come and go there, and what the grafts read of the result is proved.
        also: Folders that its layers and models import from.

    """

    package: str
    table: str
    address: str
    licence: str
    relied_on: Mapping[str, Mapping[str, tuple[str, ...]]]
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.package

    @property
    def files(self) -> dict[str, str]:
        """The path of each file."""
        return {
            ATTENTION: f"{self.package}/layers/attention.py",
            BLOCKS: f"{self.package}/layers/block.py",
            MODELS: f"{self.package}/models/vision_transformer.py",
        }

    @property
    def relevant(self) -> list[str]:
        """The files and folders that its layers and models depend on."""
        return [f"{self.package}/{p}" for p in ("__init__.py", "layers", "models", *self.also)]

    @property
    def functions(self) -> dict[str, list[str]]:
        """The names of the functions in each file."""
        return {
            section: [name for functions in classes.values() for name in functions]
            for section, classes in self.relied_on.items()
        }

    @property
    def owner(self) -> str:
        """What follows the name of a revision, where it is not one of DINOv2."""
        return "" if self is DINOV2 else f" of {self.package}"


# `Attention.__init__` makes the projection and the scale from which weights are recomputed.
DINOV2 = Project(
    UPSTREAM,
    "eras.json",
    "https://github.com/facebookresearch/dinov2",
    "",
    {
        ATTENTION: {
            "Attention": ("Attention.__init__", "Attention.forward"),
            "MemEffAttention": ("MemEffAttention.forward",),
        },
        BLOCKS: {
            "Block": ("Block.forward",),
            "NestedTensorBlock": (
                "NestedTensorBlock.forward",
                "NestedTensorBlock.forward_nested",
                "get_attn_bias_and_cat",
                "drop_add_residual_stochastic_depth_list",
            ),
            "CausalAttentionBlock": ("CausalAttentionBlock.forward",),
        },
        MODELS: {
            "DinoVisionTransformer": (
                "DinoVisionTransformer.forward",
                "DinoVisionTransformer.forward_features",
                "DinoVisionTransformer.forward_features_list",
                "DinoVisionTransformer.prepare_tokens_with_masks",
                "DinoVisionTransformer.interpolate_pos_encoding",
                "BlockChunk.forward",
            ),
        },
    },
)
DINOV3 = Project(
    "dinov3",
    "eras_dinov3.json",
    "https://github.com/facebookresearch/dinov3",
    "Meta's DINOv3 License",
    {
        ATTENTION: {
            "SelfAttention": (
                "SelfAttention.__init__",
                "SelfAttention.forward",
                "SelfAttention.forward_list",
                "SelfAttention.compute_attention",
                "SelfAttention.apply_rope",
                "rope_apply",
                "rope_rotate_half",
                "LinearKMaskedBias.__init__",
                "LinearKMaskedBias.forward",
            ),
            "CausalSelfAttention": ("CausalSelfAttention.__init__", "CausalSelfAttention.forward"),
        },
        BLOCKS: {
            "SelfAttentionBlock": (
                "SelfAttentionBlock.forward",
                "SelfAttentionBlock._forward_list",
                "SelfAttentionBlock._maybe_index_rope",
            ),
            "CausalSelfAttentionBlock": ("CausalSelfAttentionBlock.forward",),
        },
        MODELS: {
            "DinoVisionTransformer": (
                "DinoVisionTransformer.forward",
                "DinoVisionTransformer.forward_features",
                "DinoVisionTransformer.forward_features_list",
                "DinoVisionTransformer.prepare_tokens_with_masks",
                "DinoVisionTransformer.init_weights",
                "init_weights_vit",
            ),
        },
    },
    also=("utils",),
)

PROJECTS = (DINOV2, DINOV3)


def project_of(classes: Iterable[type]) -> Project:
    """Return the project that ``classes`` come from, by their package and by their names."""
    classes = list(classes)

    def fit(project: Project) -> tuple[bool, int]:
        names = {*project.relied_on[ATTENTION], *project.relied_on[BLOCKS]}
        own = any(cls.__module__.partition(".")[0] == project.package for cls in classes)
        return own, sum(cls.__name__ in names for cls in classes)

    return max(PROJECTS, key=fit)


def project_at(read: Callable[[str], str | None]) -> Project:
    """Return the project of a revision whose files ``read(path)`` returns, ``None`` if absent."""
    return next((p for p in PROJECTS if read(p.files[ATTENTION]) is not None), DINOV2)


def project_named(package: str) -> Project:
    """Return the project whose package holds ``package``, DINOv2 for all others."""
    return next((p for p in PROJECTS if p.package == package.partition(".")[0]), DINOV2)
