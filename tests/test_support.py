"""docs/support.md says what the code refuses today."""

from __future__ import annotations

from pathlib import Path

from llm_lowrank.codecs import CODECS
from llm_lowrank.engines import ENGINES
from llm_lowrank.engines.zero_config import REFUSALS
from llm_lowrank.run import support

PAGE = Path(__file__).parents[1] / "docs/support.md"


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == support.page(), "run: python -m llm_lowrank.run.support docs/support.md"


def test_a_weight_cannot_be_written_where_it_is_quantized_and_everything_else_works():
    refused = [(where, rows) for (_, where), rows in support.exceptions().items()]
    assert refused == [
        (
            "nf4; nf4 with double quantization; int8",
            ["losia `into: weight`", "relora `into: weight`", "srlora `into: weight`"],
        ),
        ("dense float32; dense bfloat16", ["`merge_base: dequantized`"]),
    ]


def test_every_engine_and_every_codec_is_tried():
    assert support.ENGINE_VARIANTS.keys() <= ENGINES.keys() and support.CODEC_VARIANTS.keys() <= CODECS.keys()
    assert len(support.variants("engine", ENGINES, support.ENGINE_VARIANTS)) == 8
    assert len(support.variants("codec", CODECS, support.CODEC_VARIANTS)) == 5


def test_every_refused_zero_option_is_listed():
    listed = {key for key, _ in support.ZERO_OPTIONS}
    for path, _, _ in REFUSALS:
        section, key, *_ = path.split(".")
        assert section != "zero_optimization" or key in listed, path


def test_an_option_of_deepspeed_is_listed_if_it_is_refused():
    refused = support.zero_exceptions()
    assert all(refused.values()) and '"offload_param": {"device": "nvme"}' in refused
    assert not any(key in refused for key in ('"overlap_comm": true', '"offload_param": {"device": "cpu"}'))
