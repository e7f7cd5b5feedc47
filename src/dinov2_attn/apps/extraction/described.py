"""What the numbers of an extraction are: axes, layers, tokens, preprocessing; and its README."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dinov2_attn.apps.extraction.options import Options
from dinov2_attn.apps.viz.images import LARGEST_SHORT_SIDE
from dinov2_attn.maps.facets import FACETS
from dinov2_attn.maps.geometry import geometry_of
from dinov2_attn.maps.measuring import STATISTICS
from dinov2_attn.typing import Model

# The one key of a shard's metadata. Safetensors writes several keys in a random order.
METADATA = "dinov2_attn"
# How many letters of a name or a list are shown. extraction.json has the rest.
LONGEST = 300


def tensors_of(model: Model, options: Options) -> dict[str, Any]:
    """Return the names of the axes of the tensors of an image, and what lies along them."""
    geometry = geometry_of(model)
    each = options.heads != "mean"
    axes = ["layers", *["heads"] * each, "queries"]
    return {
        "maps": [*axes, "rows", "columns"],
        "prefix": [*axes, "tokens"],
        "dtype": options.dtype,
        "layers": list(options.layers),
        "heads": list(range(geometry.heads)) if each else "mean",
        "queries": list(options.queries),
        "tokens": ["cls", *(f"register:{i}" for i in range(1, geometry.prefix))][: geometry.prefix],
        **{name: ["layers", "channels", "rows", "columns"] for name in options.facets},
        **{
            name: [*axes[:-1], "tokens", *["row and column"] * (name == "centroid")]
            for name in options.statistics
        },
    }


def preprocessing_of(model: Model, options: Options, transform: str | None) -> dict[str, Any]:
    """Return how an image becomes the input of the model; a dataset's tensors are unchanged."""
    height, width = geometry_of(model).patch_size
    size = options.image_size
    return {
        "transform": transform,
        "channels": options.reading.channels,
        "range": options.reading.range,
        "resize": {
            "to": f"short side of at most {LARGEST_SHORT_SIDE}" if size is None else size,
            "interpolation": "bicubic",
        },
        "crop": {"to": "whole patches from the top left", "patch_size": [height, width]},
        "mean": options.reading.mean,
        "std": options.reading.std,
    }


def metadata_of(about: dict[str, Any], lines: bytes) -> dict[str, str]:
    """Return the metadata of a shard whose index has the content ``lines``."""
    described = {key: about[key] for key in ("format", "tensors", "preprocessing")}
    return {METADATA: json.dumps({**described, "index": hashlib.sha256(lines).hexdigest()})}


def readme(about: dict[str, Any]) -> str:
    """Return the text of ``README.md``: what the folder holds and how it is read.

    Names come from outside, so each is written as JSON does, in ASCII and without a backtick.
    """
    tensors, model = about["tensors"], about["model"]
    return _TEXT.format(
        warning=f"\n**Warning: {_quoted(model['warning'])}**\n" if model["warning"] else "",
        images=f"{about['source']['images']:,}",
        name=_quoted(model["name"]),
        maps=", ".join(tensors["maps"]),
        prefix=", ".join(tensors["prefix"]),
        rows="\n".join(_rows(about)),
        shards=_SHARDS[about["options"]["format"]],
        reading=_READING[about["options"]["format"]],
    )


def _rows(about: dict[str, Any]) -> list[str]:
    tensors, made = about["tensors"], about["preprocessing"]
    grid = about["options"]["grid"]
    facts = {
        "layers, counted from 0": tensors["layers"],
        "heads": tensors["heads"],
        "queries (whose attention)": tensors["queries"],
        "tokens of `N.prefix`": tensors["tokens"],
        "dtype": tensors["dtype"],
        **{
            f"axes of `N.{name}`": tensors[name]
            for name in (*FACETS, *STATISTICS)
            if name in tensors
        },
        "rows and columns": f"resampled to {grid}" if grid else "one for each patch of the image",
        "images": {key: made[key] for key in ("transform", "range", "resize", "crop")},
        "normalised with": {key: made[key] for key in ("mean", "std")},
    }
    return [f"| {name} | {_quoted(value)} |" for name, value in facts.items()]


def _quoted(value: Any) -> str:
    text = value if isinstance(value, str) and value.isascii() and value.isprintable() else None
    text = json.dumps(value) if text is None else text
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return "`" + text.replace("`", "'").replace("|", "/") + "`"


_TEXT = """\
# Attention maps of a dataset

`dinov2-attn extract` wrote this folder: the attention of {name} on {images} images.
{warning}
| file | content |
|---|---|
| `index.jsonl` | one line of JSON for each image with maps |
| `unreadable.jsonl` | one line for each image without, with the reason |
{shards}
| `shards/*.jsonl` | the lines of the images of one shard |
| `extraction.json` | the model, the options, axes and preprocessing |

| what | value |
|---|---|
{rows}

- `N.maps` has the axes ({maps}), `N.prefix` has ({prefix}).
- A number is an attention weight, softmax(q kᵀ · scale). `N.maps` and `N.prefix` of one query
  together sum to 1.
- Tokens behind the patches, if the model has some, follow at the end of `N.prefix`.
- `prefix_mass` in the index is the share that `N.prefix` holds. `entropy` is that of a query's
  weights, in nats. Both have one number for each layer: the mean of heads and queries.
- `grid`: rows and columns of patches that the model saw. `size`: height and width of the image.
- `sha256` is of the image's file. `checksum` is of the bytes of all tensors.
- A frame of a video has its number in `frame` and its seconds in `time`. Its `sha256` is of its
  pixels.

```python
from dinov2_attn import AttentionDataset

dataset = AttentionDataset("this folder")
dataset[0]["maps"]  # a tensor; also dataset["a path of the index"], dataset[10:20], dataset.frame()
dataset.maps(0)  # the same with its layout, for dinov2_attn.viz
```

`dinov2-attn summary "this folder" -o sheet.html` shows the maps on one page.

Without the package:

```python
{reading}```
"""

_SHARDS = {
    "safetensors": (
        "| `shards/*.safetensors` | the tensors `N.maps` and `N.prefix` of image number N |"
    ),
    "zarr": (
        "| `shards/*.zarr.zip` | zarr arrays `K/maps` and `K/prefix` with a row for each image, "
        "whose numbers N are in `K/number`; each K has images of one size |"
    ),
}

_READING = {
    "safetensors": """\
import json, pathlib
from safetensors import safe_open

for line in pathlib.Path("index.jsonl").read_text().splitlines():
    image = json.loads(line)
    with safe_open(image["shard"], "pt") as shard:
        maps = shard.get_tensor(f"{image['number']}.maps")
""",
    "zarr": """\
import pathlib, zarr

for path in sorted(pathlib.Path("shards").glob("*.zarr.zip")):
    for group in zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r").groups():
        numbers, maps = group[1]["number"][:], group[1]["maps"]  # a row of maps for each number
""",
}
