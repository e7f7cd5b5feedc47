"""The config file of a checkpoint: ``config.json``, or the ``config.yaml`` of upstream's training.

It states what weights do not contain: heads, epsilon, activation, interpolation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dinov2_attn.apps.weights.files import read_json
from dinov2_attn.errors import UnreadableFileError

# Features, blocks and heads by the names of upstream's functions. timm's names begin with them.
_UPSTREAM = {
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_giant2": (1536, 40, 24),
}
_TIMM = {
    **_UPSTREAM,
    "vit_tiny": (192, 12, 3),
    "vit_huge": (1280, 32, 16),
    "vit_giant": (1408, 40, 16),
    "vit_gigantic": (1664, 48, 16),
    "vit_so400m": (1152, 27, 16),
    "vit_giant_patch14_dinov2": (1536, 40, 24),
    "vit_giant_patch14_reg4_dinov2": (1536, 40, 24),
}

# Of a positional embedding: interpolate_antialias and interpolate_offset of upstream's classes.
Interpolation = tuple[bool, float]


@dataclass(frozen=True)
class ModelConfig:
    """What a config file states of a model; ``None`` for what it does not state."""

    source: str
    embed_dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    eps: float | None = None
    activation: str | None = None
    interpolation: Interpolation | None = None
    no_embed_class: bool | None = None
    kind: str = ""

    def describes(self, embed_dim: int, depth: int) -> bool:
        """Return whether a model of this size can be the one that is described."""
        return self.embed_dim in (None, embed_dim) and self.depth in (None, depth)


def find_config(file: Path) -> ModelConfig | None:
    """Return the content of the config file that belongs to ``file``; ``None`` without one."""
    config = read_json(file.with_name("config.json"))
    if isinstance(config, dict):
        return _of_json(config, str(file.with_name("config.json")))
    # Upstream writes teacher_checkpoint.pth two folders below its config.yaml.
    for folder in list(file.absolute().parents)[:3]:
        if (folder / "config.yaml").is_file():
            return _of_yaml(folder / "config.yaml")
    return None


def _of_json(config: Mapping[str, object], source: str) -> ModelConfig | None:
    inner = config.get("backbone_config")
    if isinstance(inner, dict) and "hidden_size" in inner:
        config = inner
    if "hidden_size" in config:
        return _of_transformers(config, source)
    return _of_timm(config, source) if isinstance(config.get("architecture"), str) else None


def _of_transformers(config: Mapping[str, object], source: str) -> ModelConfig:
    eps, activation = config.get("layer_norm_eps"), config.get("hidden_act")
    kind = str(config.get("model_type", ""))
    return ModelConfig(
        source,
        embed_dim=_positive(config, "hidden_size", source),
        depth=_positive(config, "num_hidden_layers", source),
        heads=_positive(config, "num_attention_heads", source),
        eps=float(eps) if isinstance(eps, (int, float)) else None,
        activation=activation if isinstance(activation, str) else None,
        interpolation=("registers" in kind, 0.0),
        kind=kind,
    )


def _of_timm(config: Mapping[str, object], source: str) -> ModelConfig:
    given = config.get("model_args")
    options: Mapping[str, object] = given if isinstance(given, dict) else {}
    name = str(config["architecture"]).partition(".")[0]
    short = re.split(r"_patch\d", name)[0]
    embed_dim, depth, heads = _TIMM.get(name) or _TIMM.get(short) or (None, None, None)
    no_embed_class = options.get("no_embed_class")
    return ModelConfig(
        source,
        embed_dim=_positive(options, "embed_dim", source) or embed_dim,
        depth=_positive(options, "depth", source) or depth,
        heads=_positive(options, "num_heads", source) or heads,
        interpolation=(True, 0.0),
        no_embed_class=no_embed_class if isinstance(no_embed_class, bool) else None,
        kind=f"timm:{name}",
    )


def _of_yaml(path: Path) -> ModelConfig | None:
    """Read the block ``student:`` of upstream's config, whose lines are ``key: value``."""
    text = path.read_text("utf-8", "replace")[: 2**20]
    block = re.search(r"^student:[ \t]*\n((?:[ \t]+.*\n?)+)", text, re.MULTILINE)
    values = dict(
        re.findall(r"^\s+(\w+):[ \t]*['\"]?([^'\"\s#]+)", block[1] if block else "", re.M)
    )
    if values.get("arch") not in _UPSTREAM:
        return None
    embed_dim, depth, heads = _UPSTREAM[values["arch"]]
    interpolation = None
    if "interpolate_antialias" in values and "interpolate_offset" in values:
        try:
            offset = float(values["interpolate_offset"])
            interpolation = (values["interpolate_antialias"].lower() == "true", offset)
        except ValueError:
            pass
    return ModelConfig(str(path), embed_dim, depth, heads, interpolation=interpolation)


def _positive(config: Mapping[str, object], key: str, source: str) -> int | None:
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 100_000:
        raise UnreadableFileError(
            f"a whole number above 0 as {key}",
            f"{source} with {str(value)[:20]!r}",
            "Correct the file, or move the weights to a folder without it.",
        )
    return value
