"""What a rank needs while a model is loaded and at an exchange, measured in fresh processes by
benchmarks/memory.py.
"""

from __future__ import annotations

import pytest

from benchmarks import memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    # 4000 words, so that two of the largest tensor are little; 0.5 GB, so that a whole model would not pass for a shard
    memory.write(folder, 0.5, hidden=768, vocabulary=4000)
    return folder


# half a minute each; the benchmark runs all four
@pytest.mark.parametrize("engine, codec", [("deepspeed", "nf4"), pytest.param("fsdp", "dense", marks=pytest.mark.wide)])
def test_a_rank_loads_its_shard_and_exchanges_layer_by_layer(engine, codec, folder):
    for row in memory.measure(engine, codec, 2, folder):
        assert row["loading"] <= memory.loading_bound(row) < row["model"], row
        assert row["exchange"] <= memory.exchange_bound(row), row
