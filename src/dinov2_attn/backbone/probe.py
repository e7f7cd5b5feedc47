"""Which token is which, measured on the live model: change pixels, see which tokens move.

Nothing is read from the model's code, and only one number from its attributes, which is then
measured like any other guess. So it holds for tokens in any place: CLS, registers before or
behind the patches, several tokens a cell, windows and frames.

Two images A and B differ in every pixel. First one corner of A is taken from B, each in an image of
its own: the token that moves most is the patch of this corner. The four of them say how many tokens
are before and behind the patches, and the grid. Then whole cells are taken from B: in image i those
whose row, or column, has bit i set. Each token must be nearer to B's where its cell is from B, and
nearer to A's elsewhere. That proves row and column of every single token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinov2_attn._compat import is_compiled, is_transformed
from dinov2_attn.backbone.guesses import Corners, Guess, guesses
from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.mosaics import (
    NOTHING,
    Box,
    Cells,
    Centres,
    KindOfImages,
    Mosaics,
    Unclear,
    cells_of_pixels,
    centres_in,
)
from dinov2_attn.backbone.undisturbed import undisturbed
from dinov2_attn.typing import Grid

# A patch is at most this much as far from its own image as from the other. Without overlap it is
# hardly apart from its own at all.
_NEARER = 0.5

# A token that sees all of the image need not see all parts alike: some by this factor less.
_UNEVEN = 4

# Tokens move by rounding too: equal images in other places of a batch say by how much.
_ABOVE_ROUNDING = 8.0

# Sides of the corners, in pixels. A model that shrinks its images may not see a single pixel.
_SIDES = (1, 2, 4, 8)

# Where stems overlap, this part of the tokens moves most with its own row and column. All of them
# move with it by more than the second share of what they move most by, and with others than its
# neighbours by less than the third.
_IN_PLACE, _ALMOST, _FAR = 0.6, 0.6, 0.5

# Rows that are changed together where stems overlap are at least this far apart.
_APART = 4


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Attributes:
        layout: The layout of each sequence, or None.
        reason: Why there is none; empty if there is one.
        sequences: How many sequences the attention gets for each image: 1, or the number of
            windows, of frames, or of channels that run one by one.
        windows: Rows and columns of windows in an image. The grid of ``layout`` is that of one
            window. ``(1, 1)`` if each sequence sees the whole image, or a whole frame.

    """

    layout: Layout | None
    reason: str = ""
    sequences: int = 1
    windows: Grid = (1, 1)


def probe(
    model: nn.Module,
    attention: nn.Module,
    images: Tensor | KindOfImages,
    run: Callable[[Tensor], object] | None = None,
    around: nn.Module | None = None,
) -> Probed:
    """Return the layout of the tokens that ``attention`` is given for such images.

    The model runs up to ``attention`` a few times, in evaluation mode and without autograd, on
    about 20 images altogether. What that changes in the model and in random states is
    restored. Hooks of the model run too, except those of ``attention``.

    Args:
        model: What ``run`` runs: all of its modules are set to evaluation mode.
        attention: The module whose first input, ``(B, N, C)``, has the tokens.
        images: The images of a pass, ``(B, …, H, W)``, or of what kind they were.
        run: Runs the model on images of any batch size; by default ``model`` itself.
        around: A larger model with ``model`` inside, in which changes are undone too.

    Returns:
        What was found. Where there is no layout, ``reason`` says why. Nothing is raised, not
        even what the model raises on the images of the probe.

    """
    kind = KindOfImages.of(images) if isinstance(images, Tensor) else images
    if (
        not isinstance(kind, KindOfImages)
        or len(kind.shape) < 3
        or not kind.dtype.is_floating_point
    ):
        return Probed(None, "the model was not given floating images (B, …, H, W)")
    if is_transformed():
        return Probed(None, "a graph is being traced, and its tensors have no values")
    # Their stance is that of all threads, so it cannot be changed for one.
    if any(map(is_compiled, model.modules())):
        return Probed(None, "the model has compiled modules, which would be compiled again")
    try:
        with undisturbed(model, kind.device, around):
            mosaics = Mosaics(run or model, attention, kind)
            return _find(mosaics)
    except Unclear as why:
        return Probed(None, str(why))
    except Exception as error:
        return Probed(None, f"the model raised {type(error).__name__} in the probe: {error}")


def _find(mosaics: Mosaics) -> Probed:
    corners = measure_corners(mosaics)
    tried = []
    for guess in guesses(corners):
        if _holds(guess, corners, mosaics):
            return Probed(guess.layout, "", corners.moves.shape[1], guess.windows)
        tried.append("{} × {}".format(*guess.grid))
    if tried:
        raise Unclear(f"tokens do not move cell by cell on a grid of {' or '.join(tried)}")
    places = ", ".join(str(position) for _, position in corners.places)
    raise Unclear(f"the corners of the image move the tokens {places}, as on no grid")


def measure_corners(mosaics: Mosaics) -> Corners:
    box = mosaics.box
    for side in _SIDES:
        corners = _corners_of(mosaics, box, side)
        if _all_move(corners):
            return corners
        if side == 1:
            box = _seen(mosaics, corners.limit)
            corners = _corners_of(mosaics, box, side)
            if _all_move(corners):
                return corners
    raise Unclear("no token moves when a corner of the image changes")


def _corners_of(mosaics: Mosaics, box: Box, side: int) -> Corners:
    top, bottom, left, right = box
    squares = [
        (row, row + side, column, column + side)
        for row in (top, bottom - side)
        for column in (left, right - side)
    ]
    masks = [*map(mosaics.mask, squares), mosaics.mask(NOTHING)]
    moves, from_b, resolution = mosaics.distances(masks)
    rounding, whole = float(moves[-1].max()), float(from_b[-1].max())
    if not math.isfinite(whole):
        raise Unclear("tokens are not finite numbers")
    if whole == 0:
        raise Unclear("no token moves when the image changes")
    if rounding > whole / _ABOVE_ROUNDING:
        raise Unclear("equal images give other tokens, so these depend on chance or on the batch")
    return Corners(box, moves[:-1], from_b[-1], _ABOVE_ROUNDING * (rounding + resolution))


def _all_move(corners: Corners) -> bool:
    return bool((corners.moves.flatten(1).amax(-1) > corners.limit).all())


def _seen(mosaics: Mosaics, limit: float) -> Box:
    """Return the pixels that tokens depend on.

    Convolutions leave out a rest that is no whole patch, other models crop.
    """
    height, width = mosaics.height, mosaics.width

    def moved(sizes: list[int]) -> list[bool]:
        top, bottom, left, right = sizes
        strips = [
            (0, top, 0, width),
            (height - bottom, height, 0, width),
            (0, height, 0, left),
            (0, height, width - right, width),
        ]
        moves = mosaics.distances(list(map(mosaics.mask, strips))).from_a
        return [bool(yes) for yes in moves.flatten(1).amax(-1) > limit]

    top, bottom, left, right = _smallest(moved, [height, height, width, width])
    return top - 1, height - bottom + 1, left - 1, width - right + 1


def _smallest(holds: Callable[[list[int]], list[bool]], most: list[int]) -> list[int]:
    """Return the smallest numbers for which ``holds``, which holds for all of ``most``.

    All of them are bisected together, so that the model runs once for each step.
    """
    least = [0] * len(most)
    while any(b - a > 1 for a, b in zip(least, most, strict=True)):
        middle = [(a + b + 1) // 2 for a, b in zip(least, most, strict=True)]
        yes = holds(middle)
        least = [a if y else m for a, m, y in zip(least, middle, yes, strict=True)]
        most = [m if y else b for b, m, y in zip(most, middle, yes, strict=True)]
    return most


def _holds(guess: Guess, corners: Corners, mosaics: Mosaics) -> bool:
    """Return whether each token of ``guess`` moves with its cell, and no other token like one."""
    if _other_patches(guess.layout, corners):
        return False
    equal = cells_of_pixels(mosaics, guess.grid, centres_in(corners.box, guess.grid))
    if _bits_agree(guess, mosaics, equal):
        return True
    if any(1 < count < _APART for count in guess.grid):  # too few to tell from chance
        return False
    measured = cells_of_pixels(mosaics, guess.grid, _centres(guess, mosaics))
    return _residues_agree(guess, mosaics, measured)


def _other_patches(layout: Layout, corners: Corners) -> bool:
    """Return whether a token outside of the patches may be one: it moves, and not at each corner.

    A token that sees all of n cells alike moves at a corner by 1/√n of what moves the patch there.
    """
    inside = slice(layout.patches.start, layout.patches.stop)
    moving = corners.whole > corners.limit
    moving[:, inside] = False
    if layout.cells == 1:
        return bool(moving.any())
    alike = corners.shares[..., inside].amax((1, 2)).amin() / math.sqrt(layout.cells)
    return bool((moving & (corners.shares.amin(0) < alike / _UNEVEN)).any())


def _bits_agree(guess: Guess, mosaics: Mosaics, cells: Cells) -> bool:
    """Return whether each bit of its row and column says of which image a token is."""
    masks = _of_both_axes(cells, guess.grid, _bits)
    if not masks:  # one cell
        return True
    from_a, from_b = _distances(guess, mosaics, masks)
    is_b = torch.stack(
        _of_both_axes(guess.cells(from_a.shape[1], from_a.device), guess.grid, _bits)
    )
    near, far = torch.where(is_b, from_b, from_a), torch.where(is_b, from_a, from_b)
    return bool((near < _NEARER * far).all())


def _residues_agree(guess: Guess, mosaics: Mosaics, cells: Cells) -> bool:
    """Return whether tokens move most with their own row and column of those far apart.

    Where stems overlap, neighbours move a token too. Here rows from B are four or more apart: those
    with one remainder by m, and by m + 1, which together name the row. Some tokens may move a
    little more with the next row, as a stem may see half of each, but not with one farther away.
    """
    for axis, count in enumerate(guess.grid):
        for modulus in _moduli(count):
            masks = [cells[axis] % modulus == rest for rest in range(modulus)]
            moves, _ = _distances(guess, mosaics, masks)
            own = guess.cells(moves.shape[1], moves.device)[axis]
            # In the order of their distance from each token's own row.
            order = (torch.arange(modulus, device=own.device)[:, None, None] + own) % modulus
            moves = moves.gather(0, order.expand_as(moves)) / moves.amax(0)
            in_place = (moves[0] == 1).double().mean() >= _IN_PLACE
            if not (in_place and (moves[0] > _ALMOST).all() and (moves[2:-1] < _FAR).all()):
                return False
    return True


def _centres(guess: Guess, mosaics: Mosaics) -> Centres:
    """Return the centres of what the tokens of the first and the last cell see.

    On either side of a centre is half of what moves the token. Cells need not be equal: a stem
    may pad, and its last patch may be cut.
    """
    height, width = mosaics.height, mosaics.width

    def moved(sizes: list[int]) -> list[bool]:
        rows = [mosaics.mask((0, size, 0, width)) for size in sizes[:2]]
        columns = [mosaics.mask((0, height, 0, size)) for size in sizes[2:]]
        from_a, from_b = _distances(guess, mosaics, [*rows, *columns])
        # The last token of several in a cell is as good as its first.
        ends = [(0, 0), (-1, -1)] * 2
        return [bool(from_b[i][end] < from_a[i][end]) for i, end in enumerate(ends)]

    first, last, left, right = _smallest(moved, [height, height, width, width])
    return (first - 0.5, last - 0.5), (left - 0.5, right - 0.5)


def _moduli(count: int) -> tuple[int, ...]:
    """Return numbers without a common divisor, whose product is ``count`` or more."""
    m = max(_APART, math.isqrt(count - 1))
    return (m, m + 1) if count > 1 else ()


def _distances(guess: Guess, mosaics: Mosaics, masks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return how far the patch tokens of each image are from those of A and of B, ``(M, S, P)``."""
    inside = slice(guess.layout.patches.start, guess.layout.patches.stop)
    from_a, from_b, _ = mosaics.distances(masks)
    return from_a[..., inside], from_b[..., inside]


def _of_both_axes(
    numbers: Cells, grid: Grid, masks: Callable[[Tensor, int], list[Tensor]]
) -> list[Tensor]:
    return [mask for axis in (0, 1) for mask in masks(numbers[axis], grid[axis])]


def _bits(numbers: Tensor, count: int) -> list[Tensor]:
    """Return where ``numbers`` below ``count`` have the bit 1, the bit 2, the bit 4 and so on."""
    return [(numbers >> bit) % 2 == 1 for bit in range((count - 1).bit_length())]
