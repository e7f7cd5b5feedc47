"""torch.export of grafted models: upstream's own graph, and one of the weights."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import dinov2_attn
from dinov2_attn._compat import is_compiling
from tests.support.bit_identity import assert_unchanged
from tests.support.compiling import asking, compiles
from tests.support.recordings import IMAGES, Around, assert_all_close, build
from tests.support.tolerances import assert_close, assert_same_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Dynamo's own differ from version to version
    pytest.mark.skipif(
        not (compiles() and hasattr(torch, "export")),
        reason="no torch.export here: test_machinery traces",
    ),
    asking,
    pytest.mark.parametrize("strict", [True, False]),
    pytest.mark.usefixtures("fresh_dynamo"),
]


class Last(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner.get_last_self_attention(x, queries="cls")


class Both(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, return_attention=True)


class Told(nn.Module):
    def forward(self, x):
        return x + 1 if is_compiling() else x


def test_code_that_is_exported_is_told_so(strict):
    exported = torch.export.export(Told(), (IMAGES,), strict=strict).module()
    assert_same_bits(exported(IMAGES), IMAGES + 1)
    assert not is_compiling()


def test_features_export_to_the_very_graph_of_upstream(first, strict):
    model, graphs = build(first, depth=2), []

    def run():
        exported = torch.export.export(model, (IMAGES,), strict=strict)
        graphs.append([(node.op, str(node.target)) for node in exported.graph.nodes])
        return [exported.module()(IMAGES * 2)]

    assert_unchanged(run)
    assert graphs[0] == graphs[1]
    assert len(graphs[0]) > 20


def test_weights_export(grafted, strict):
    model, other = build(grafted, depth=2), IMAGES * 2
    asked = torch.export.export(model, (IMAGES,), {"return_attention": True}, strict=strict)
    output, attentions = asked.module()(other, return_attention=True)
    assert_close(output, model(other))
    assert_all_close(attentions, model.get_self_attention(other))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            exported = torch.export.export(Last(model), (IMAGES,), strict=strict).module()
            assert_close(exported(other), model.get_last_self_attention(other, queries="cls"))


def test_a_batch_of_any_size_stays_one(grafted, strict):
    """What is asked exports for the batches that features export for."""
    model, other = build(grafted, depth=2), IMAGES.repeat(3, 1, 1, 1)
    some = {0: torch.export.Dim("batch", min=2, max=64)}

    def export(module):
        exported = torch.export.export(module, (IMAGES,), dynamic_shapes=(some,), strict=strict)
        return exported.module()(other)

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_close(export(Around(model)), model(other))
            assert_close(export(Last(model)), model.get_last_self_attention(other, queries="cls"))
            output, attentions = export(Both(model))
            assert_close(output, model(other))
            assert_all_close(attentions, model.get_self_attention(other))


@pytest.mark.parametrize("what", ["recording", "edit"])
def test_a_block_that_another_thread_ended_is_not_seen(grafted, strict, what):
    """Its generator is closed there, while this thread still has it in its list."""
    model = build(grafted, depth=2)

    def suspended():
        with dinov2_attn.record(model) if what == "recording" else dinov2_attn.edit(model, heads=0):
            yield model(IMAGES)

    with torch.no_grad():
        generator = suspended()
        next(generator)
        thread = threading.Thread(target=generator.close)
        thread.start()
        thread.join()
        exported = torch.export.export(Both(model), (IMAGES,), strict=strict).module()
        output, attentions = exported(IMAGES)
        assert_close(output, model(IMAGES))
        assert_all_close(attentions, model.get_self_attention(IMAGES))
        exported = torch.export.export(Last(model), (IMAGES,), strict=strict).module()
        assert_close(exported(IMAGES), attentions[-1][:, :, :1])


def test_an_exported_module_outlives_uninstall(first, strict):
    """It is a graph of its own, with nothing of the grafts in it."""
    model = build(first, depth=2)
    with dinov2_attn.install():
        expected = model.get_last_self_attention(IMAGES, queries="cls")
        exported = torch.export.export(Last(model), (IMAGES,), strict=strict).module()
    assert_close(exported(IMAGES), expected)
