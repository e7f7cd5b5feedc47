"""Whether upstream's own models give the same bits with and without the plugin."""

from __future__ import annotations

import dinov2_attn
from tests.support.recordings import IMAGES
from tests.support.tolerances import assert_same_bits


def one_pass(model, images=IMAGES):
    """Return the output of one forward pass and the gradients of its backward pass."""
    model.zero_grad()
    output = model(images)
    if output.requires_grad:
        output.double().square().sum().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_unchanged(run):
    """Compare what ``run`` returns ungrafted, grafted and ungrafted again, bit for bit."""
    before = run()
    with dinov2_attn.install():
        during = run()
    for answers in (during, run()):
        assert_same_bits(answers, before)
    return before
