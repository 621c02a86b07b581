"""Batches made ahead, in pinned memory:  pytest -m gpu tests/gpu"""

from __future__ import annotations

import pytest
import torch

from llm_lowrank.data import Batches, Example
from llm_lowrank.run.ahead import Ahead

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_batches_made_ahead_are_pinned_and_arrive_whole():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    examples = [Example(list(range(k, k + 50)), list(range(k, k + 50))) for k in range(64)]
    batches = Batches(examples, 4, pad_id=0, pack=200)
    with Ahead(batches, 8, device) as ahead:
        for t in range(8):
            (micro,), (wanted,) = ahead.step(t), batches.step(t)
            assert micro.input_ids.is_pinned() and micro.labels.is_pinned() and micro.position_ids.is_pinned()
            found = micro.inputs(device)
            assert {name: tensor.cpu().tolist() for name, tensor in found.items()} == {
                name: tensor.tolist() for name, tensor in wanted.inputs(torch.device("cpu")).items()
            }
