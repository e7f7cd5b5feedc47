"""PyTorch's own machinery works on grafted models as on upstream's."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from strategies import noise

IMAGES = noise(2, 3, 4, 6, seed=0)


@pytest.fixture(scope="module")
def model(models):
    return models.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=4, depth=2, num_heads=1, block_chunks=0
    ).eval()


def test_copies_and_pickles_answer_alike(model):
    expected = model.get_last_self_attention(IMAGES)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    options = {} if torch.__version__ < "2.1" else {"weights_only": False}
    for twin in (copy.deepcopy(model), torch.load(buffer, **options)):
        assert torch.equal(twin.get_last_self_attention(IMAGES), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(noise(*parameter.shape, seed=1))
        assert not torch.equal(twin.get_last_self_attention(IMAGES), expected)
