#!/usr/bin/env python3
"""Damage checkpoints, images and names of pages at random, and see that each is read or refused.

    PYTHONPATH=. python tools/soak/fuzz.py checkpoints images pages --minutes 20 --keep FOLDER

Every kind gets its share of the time. A damaged file is read in a process of its own, whose memory
is limited. It must be read, or refused with an error of this package, within seconds. A model that
refused a file keeps its bits, no code in a file runs, and a page has the elements of a page with a
harmless title. What fails is written to FOLDER, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import pickle
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tests.support import upstreams
from tests.support.recordings import IMAGES, build

import dinov2_attn
from dinov2_attn import load_checkpoint, viz
from dinov2_attn.errors import Dinov2AttnError

SECONDS, MEMORY = 20, 3 * 2**30
NUMBERS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\1\0\0")
LETTERS = "<>&\"'`/{}()\\%$;=\n\r\t\0\x1b\u202e\u2028\ud800aé中🦕 -"
WORDS = ("</script>", "<script>", "{{data}}", "<!--", "]]>", "</title>", "javascript:", "&lt;")


MARKER = "marker"  # the file that hostile pickles make


def small_model():
    """Return a small DINOv2 of upstream's classes."""
    upstreams.FIRST.load()
    dinov2_attn.install()
    return build(upstreams.FIRST)


# What is damaged


def pictures():
    """Return small images in every format that Pillow writes here."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 42, 3), dtype=np.uint8)
    image, found = Image.fromarray(pixels), {}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "JPEG2000"):
        for mode in ("RGB", "L", "P", "RGBA", "I;16", "1", "CMYK"):
            written = io.BytesIO()
            try:
                shown = (
                    Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == "I;16" else image
                )
                (shown if mode == "I;16" else shown.convert(mode)).save(written, kind)
            except (OSError, KeyError, ValueError):
                continue
            found[f"{kind} {mode}"] = written.getvalue()
    return found


class Marker:
    """What runs code, if a pickle of it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def checkpoints(model, marker):
    """Return checkpoints of ``model``, as torch and safetensors write them, and hostile ones."""
    state, found = model.state_dict(), {}
    nested = {"teacher": {f"backbone.{k}": v for k, v in state.items()}, "epoch": 3}
    for name, content in (("plain", state), ("nested", nested), ("list", [state])):
        for old in (False, True):
            written = io.BytesIO()
            torch.save(content, written, _use_new_zipfile_serialization=not old)
            found[f"{name} {'old' if old else 'zip'}"] = written.getvalue()
    found["pickle"] = pickle.dumps({"a": Marker(marker)})
    written = io.BytesIO()
    torch.save({**state, "a": Marker(marker)}, written)
    found["hostile"] = written.getvalue()
    try:
        from safetensors.torch import save
    except ImportError:
        print("safetensors is not installed: its files are left out", file=sys.stderr)
    else:
        found["safetensors"] = save({name: one.contiguous() for name, one in state.items()})
    return found


def damaged(draw, content, other):
    """Return ``content`` with a few random faults, some of them taken from ``other``."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3, 8, 30))):
        at = draw.randrange(len(data) + 1)
        if draw.random() < 0.3:
            at = min(at, draw.randrange(200))  # where headers are
        match draw.randrange(7):
            case 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del data[at:]
            case 2:
                data[at : at + 4] = draw.choice(NUMBERS)
            case 3:
                del data[at : at + draw.randrange(1, 64)]
            case 4:
                data[at:at] = data[at : at + draw.randrange(1, 256)] * draw.choice((1, 2, 1000))
            case 5:
                start = draw.randrange(len(other) + 1)
                data[at:at] = other[start : start + draw.randrange(1, 300)]
            case 6 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
    return bytes(data)


# What reads them, in another process


class Reader:
    """Reads one file after the other."""

    def __init__(self, folder):
        self.model, self.marker = small_model(), folder / MARKER
        self.state = {name: one.clone() for name, one in self.model.state_dict().items()}
        self.elements = self._elements("Attention")

    def images(self, path):
        found = viz.load_image(path, 14)
        assert torch.isfinite(found.tensor).all()
        assert not any(side % 14 for side in found.tensor.shape[-2:])

    def checkpoints(self, path):
        try:
            load_checkpoint(self.model, path)
        except Dinov2AttnError:
            for name, one in self.model.state_dict().items():
                assert torch.equal(one, self.state[name]), f"{name} changed"
            raise
        finally:
            assert not self.marker.exists(), "code in the file ran"
            self.model.load_state_dict(self.state)

    def pages(self, path):
        title = pickle.loads(path.read_bytes())
        assert self._elements(title) == self.elements, "other elements"

    def _elements(self, title):
        class Elements(HTMLParser):
            def __init__(self):
                super().__init__()
                self.found = Counter()

            def handle_starttag(self, tag, attributes):
                self.found[tag, tuple(sorted(name for name, _ in attributes))] += 1

        page = viz.explore(self.model, IMAGES[:1].sigmoid(), title=title).content.decode()
        elements = Elements()
        elements.feed(page)
        return elements.found


def read_all(pipe, folder):
    """Read what the pipe names, and say what came of it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    reader = Reader(folder)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    pipe.send("ready")
    while True:
        kind, path = pipe.recv()
        try:
            getattr(reader, kind)(path)
        except Dinov2AttnError as error:
            pipe.send((True, type(error).__name__))
        except BaseException as error:  # whatever it is, it is reported
            pipe.send((False, f"{type(error).__name__}: {error}"[:300]))
        else:
            pipe.send((True, "read"))


class Reading:
    """A process that reads, and another one where it ended."""

    def __init__(self, folder):
        self.folder, self.process = folder, None

    def __call__(self, kind, path):
        if self.process is None:
            self._start()
        self.pipe.send((kind, path))
        if not self.pipe.poll(SECONDS):
            return self._over(f"no answer in {SECONDS} seconds")
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return self._over(f"the process ended with status {self.process.exitcode}")

    def _start(self):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=read_all, args=(theirs, self.folder), daemon=True)
        self.process.start()
        theirs.close()
        assert self.pipe.recv() == "ready"

    def _over(self, why):
        self.process.kill()
        self.process = None
        return False, why


def fuzz(kind, seeds, minutes, seed, keep, folder):
    """Return how many files came to what, and those that failed."""
    draw, counts, failed, slowest = random.Random(seed), Counter(), [], 0.0
    names, end = sorted(seeds), time.monotonic() + 60 * minutes
    reading, path = Reading(folder), folder / "file"
    while time.monotonic() < end:
        name = draw.choice(names)
        if kind == "pages":
            length = draw.choice((1, 5, 50, 3000))
            parts = [draw.choice((*LETTERS, *WORDS)) for _ in range(length)]
            content = pickle.dumps("".join(parts))
        else:
            content = damaged(draw, seeds[name], seeds[draw.choice(names)])
        path.write_bytes(content)
        start = time.monotonic()
        right, what = reading(kind, path)
        slowest = max(slowest, time.monotonic() - start)
        counts[what if right else "FAILED"] += 1
        if not right:
            failed.append(f"{kind} {name}: {what}")
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{kind}-{seed}-{sum(counts.values())}").write_bytes(content)
    told = ", ".join(f"{what} {count}" for what, count in counts.most_common())
    print(f"| {kind} | {sum(counts.values())} | {told} | {slowest:.1f} s |", flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="+", choices=("checkpoints", "images", "pages"))
    parser.add_argument("--minutes", type=float, default=1.0, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzzed"), help="where failures go")
    arguments = parser.parse_args()
    print("| what | files | came to | slowest |\n|---|---|---|---|")
    each, failed = arguments.minutes / len(arguments.kinds), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = {
            "images": pictures(),
            "checkpoints": checkpoints(small_model(), folder / MARKER),
            "pages": {"title": b""},
        }
        for kind in arguments.kinds:
            failed += fuzz(kind, seeds[kind], each, arguments.seed, arguments.keep, folder)
    print("\n".join(failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
