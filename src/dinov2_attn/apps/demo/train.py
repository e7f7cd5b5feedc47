"""Train the demo model: ``python -m dinov2_attn.apps.demo.train``.

The loss compares the CLS row of the last block (mean of heads) with the patches of the target. Its
gradients flow through the attention weights that this package returns.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import dinov2_attn
from dinov2_attn._files import atomic_file
from dinov2_attn.apps.demo.game import held_out, table, to_tensor
from dinov2_attn.apps.demo.load import ARCHITECTURE, build, fill
from dinov2_attn.apps.demo.scenes import FIRST_TRAINING_SEED, PATCH, Scene, draw
from dinov2_attn.apps.weights.source import obtain

STEPS = 900
BATCH = 64
RATE = 1e-3
WARMUP = 100
SIDES = (5, 11)  # of the grids, in patches; the end is excluded
# A second thread gains little for such a small model, and costs much on a shared machine.
THREADS = 1


def batches(seed: int, steps: int) -> Iterator[list[Scene]]:
    """Yield a batch of new scenes for each step, all with one random grid."""
    random = np.random.RandomState(seed)
    for step in range(steps):
        height, width = random.randint(*SIDES, 2)
        first = FIRST_TRAINING_SEED + step * BATCH
        yield [draw(first + i, (int(height), int(width))) for i in range(BATCH)]


def loss_of(model: Any, scenes: list[Scene]) -> Tensor:
    """Return the cross entropy between the target's patches and the CLS row."""
    rows = model.get_last_self_attention(to_tensor(scenes), queries="cls", heads="mean")
    masks = torch.from_numpy(np.stack([scene.mask for scene in scenes])).float()
    covered = functional.avg_pool2d(masks, PATCH).flatten(1)
    wanted = covered / covered.sum(1, keepdim=True)
    loss: Tensor = -(wanted * rows[:, 0, 1:].clamp_min(1e-12).log()).sum(1).mean()
    return loss


def start(seed: int) -> Any:
    """Return the model at the start of training, with its positional embedding fixed at zero.

    Revisions of upstream interpolate the embedding differently. Zeros stay zeros in all of them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build()
    model.pos_embed.requires_grad_(False).zero_()
    return model.train()


def train(seed: int, steps: int) -> Any:
    """Return the model after ``steps`` steps of training."""
    model = start(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.05)
    begun = time.monotonic()
    for step, scenes in enumerate(batches(seed, steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        loss = loss_of(model, scenes)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.3f}, {time.monotonic() - begun:.0f} s", flush=True)
    return model.eval()


def save(model: Any, path: Path) -> None:
    """Write the weights in float16, with the architecture as metadata."""
    from safetensors.torch import save_file

    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    with atomic_file(path) as unfinished:
        save_file(state, unfinished, {key: str(value) for key, value in ARCHITECTURE.items()})


def rate(step: int, steps: int) -> float:
    """Return the learning rate: linear warmup, cosine decay."""
    progress = step / steps
    return RATE * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * progress)))


def main() -> None:
    """Train, write the file and print the table of the model card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("model.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repo", metavar="PATH", help="a checkout of facebookresearch/dinov2")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    sys.modules.setdefault("xformers", None)  # type: ignore[arg-type]  # no kernels for a CPU
    torch.set_num_threads(THREADS)
    print(obtain(args.repo))
    dinov2_attn.install()
    save(train(args.seed, STEPS), args.output)
    print("\n".join(table(fill(build(), args.output), held_out())))
    print("sha256", hashlib.sha256(args.output.read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
