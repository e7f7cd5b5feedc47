"""A contact sheet of an extraction: one page with a small map of each image, in some order."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from dinov2_attn._files import write_file
from dinov2_attn.apps.extraction.frame import artifacts_in
from dinov2_attn.apps.extraction.options import at_least
from dinov2_attn.apps.extraction.thumbnails import Photographs, map_picture
from dinov2_attn.errors import InvalidInputError, OutOfRangeError, shown_name

if TYPE_CHECKING:
    from dinov2_attn.apps.extraction.read import AttentionDataset

SortKey = Literal["prefix_mass", "entropy", "artifacts"]
# What comes first: the highest, and the lowest.
WORDS = {
    "prefix_mass": ("highest prefix mass", "lowest prefix mass"),
    "entropy": ("highest entropy", "lowest entropy"),
    "artifacts": ("most artifact tokens", "fewest artifact tokens"),
}


@dataclass(frozen=True)
class ContactSheet:
    """A page of small maps. A notebook shows it as the value of a cell.

    Attributes:
        content: The HTML file.
        shown: How many images it shows.
        images: How many images the dataset has.

    """

    content: bytes = field(repr=False)
    shown: int
    images: int

    def save(self, path: str | Path) -> None:
        """Write the page to ``path``, whole or not at all. Missing folders are created.

        Raises:
            UnwritableOutputError: If the file cannot be written.

        """
        write_file(path, self.content)

    def _repr_html_(self) -> str:
        page = escape(self.content.decode())
        frame = 'sandbox="" width="100%" height="700" style="border: 0"'
        return f'<iframe srcdoc="{page}" {frame}></iframe>'


@dataclass(frozen=True)
class Card:
    """The numbers of one image. ``value`` is the one that orders the sheet."""

    position: int
    value: float | None
    prefix_mass: float | None
    evenness: float | None
    artifacts: int | None


def contact_sheet(
    dataset: AttentionDataset,
    by: SortKey,
    layer: int | None,
    count: int,
    lowest: bool,
    images: str | Path | None,
) -> ContactSheet:
    """Return the sheet of ``dataset``; see ``AttentionDataset.sheet``."""
    place = _place_of(dataset.about["tensors"]["layers"], layer)
    cards = sorted_cards(dataset, by, place, lowest)[: at_least(1, count, "count")]
    photographs = Photographs(dataset.about, None if images is None else Path(images))
    figures = "\n".join(
        _figure(dataset, card, place, rank, photographs) for rank, card in enumerate(cards, 1)
    )
    page = _page(dataset, by, place, lowest, len(cards), photographs, figures)
    return ContactSheet(page.encode(), len(cards), len(dataset))


def sorted_cards(dataset: AttentionDataset, by: SortKey, place: int, lowest: bool) -> list[Card]:
    """Return all images in the order of a number; those that do not have it come last.

    Args:
        dataset: The images.
        by: The number.
        place: The place of the layer among those that are stored.
        lowest: Whether the lowest number comes first.

    """
    if by not in get_args(SortKey):
        raise InvalidInputError(
            f"by as one of {', '.join(map(repr, get_args(SortKey)))}", repr(by), "Name one."
        )
    if by == "artifacts" and not dataset.about["options"]["artifacts"]:
        raise InvalidInputError(
            "an extraction with artifact tokens, to sort by them",
            "one in which they were not looked for",
            "Sort by prefix mass or entropy, or extract with --artifacts (in Python "
            "artifacts=True) into another folder.",
        )
    cards = list(_cards(dataset, by, place))
    sign = 1 if lowest else -1
    return sorted(cards, key=lambda card: (card.value is None, sign * (card.value or 0)))


def _cards(dataset: AttentionDataset, by: SortKey, place: int) -> Iterator[Card]:
    others = dataset[0]["prefix"].shape[-1] if len(dataset) else 0
    for position, entry in enumerate(dataset.entries()):
        seen = entry["grid"][0] * entry["grid"][1] + others
        mass, entropy = entry["prefix_mass"][place], entry["entropy"][place]
        found = artifacts_in(entry)
        # Of one token, all attention goes to that one, which is as even as it can be.
        evenness = None if entropy is None else entropy / math.log(seen) if seen > 1 else 1.0
        value = {"prefix_mass": mass, "entropy": evenness, "artifacts": found}[by]
        yield Card(position, value, mass, evenness, found)


def _place_of(layers: list[int], layer: int | None) -> int:
    if layer is None:
        return len(layers) - 1
    if layer not in layers:
        raise OutOfRangeError(
            f"a layer that is stored: {', '.join(map(str, layers))}",
            repr(layer),
            "Leave it out for the last one.",
        )
    return layers.index(layer)


def _figure(
    dataset: AttentionDataset, card: Card, place: int, rank: int, photographs: Photographs
) -> str:
    entry = dataset.entry(card.position)
    picture = map_picture(dataset[card.position], place, entry)
    name = shown_name(entry["path"])
    facts = [
        f"prefix {_share(card.prefix_mass)}",
        f"entropy {_share(card.evenness)}",
        *[f"{card.artifacts} artifact{'s' * (card.artifacts != 1)}"] * (card.artifacts is not None),
        f"colours to {picture.highest:.3g}×",
    ]
    return (
        f'<figure><div class="pictures">{photographs.html(entry)}{picture.html(name)}</div>'
        f"<figcaption><bdi>{escape(name)}</bdi>"
        f'<span class="place">{rank}. dataset[{card.position}]</span>'
        f"<span>{' · '.join(facts)}</span></figcaption></figure>"
    )


def _page(
    dataset: AttentionDataset,
    by: SortKey,
    place: int,
    lowest: bool,
    count: int,
    photographs: Photographs,
    figures: str,
) -> str:
    about, style = dataset.about, _file("sheet.css")
    tensors = about["tensors"]
    heads = "the mean of heads" if tensors["heads"] != "mean" else "the stored mean of heads"
    query = shown_name(tensors["queries"][0])
    sentences = [
        f"{count:,} of {len(dataset):,} images, {WORDS[by][lowest]} first.",
        f"Layer {tensors['layers'][place]}, {heads}, attention of {query} "
        "(the first stored query).",
        "Each map has its own colours, from 0 to the number below it, in multiples of uniform "
        "attention." + " Frames mark artifact tokens." * about["options"]["artifacts"],
        "Prefix: the share of the attention to tokens that are no patches. Entropy: as a share of "
        "its maximum, which is uniform attention.",
        *photographs.sentences(),
    ]
    warning = about["model"]["warning"]
    return _file("sheet.html").format(
        policy=f"default-src 'none'; img-src data:; style-src {_digest(style)}; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        title=escape(shown_name(Path(dataset.folder).resolve().name)),
        model=escape(shown_name(about["model"]["name"])),
        warning=f'<p class="warning">{escape(shown_name(warning))}</p>' if warning else "",
        sentences="\n".join(f"<p>{escape(sentence)}</p>" for sentence in sentences),
        figures=figures,
    )


def _share(number: float | None) -> str:
    return "unknown" if number is None else f"{100 * number:.3g} %"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
