"""docs/support.md says what the code refuses today."""

from __future__ import annotations

from pathlib import Path

from llm_lowrank.codecs import CODECS
from llm_lowrank.engines import ENGINES
from llm_lowrank.engines.zero_config import REFUSALS
from llm_lowrank.run import support

PAGE = Path(__file__).parents[1] / "docs/support.md"


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == support.page(), "run: llm-lowrank support docs/support.md"


def test_a_weight_cannot_be_written_where_it_is_quantized_and_everything_else_works():
    refused = [(where.split("; "), rows) for (_, where), rows in support.exceptions().items()]
    stored = list(support.variants("codec", CODECS, support.CODEC_VARIANTS))
    dense = [name for name in stored if name.startswith("dense")]
    assert refused == [
        (
            [name for name in stored if name not in dense],
            [f"{name} `into: weight`" for name in ("cola", "losia", "plora", "relora", "srlora")],
        ),
        (dense, ["`merge_base: dequantized`"]),
    ]


def test_every_engine_and_every_codec_is_tried():
    assert support.ENGINE_VARIANTS.keys() <= ENGINES.keys() and support.CODEC_VARIANTS.keys() <= CODECS.keys()
    engines = support.variants("engine", ENGINES, support.ENGINE_VARIANTS)
    codecs = support.variants("codec", CODECS, support.CODEC_VARIANTS)
    assert {settings["engine"] for settings in engines.values()} == set(ENGINES) and len(engines) >= 8
    assert {settings["codec"] for settings in codecs.values()} == set(CODECS) and len(codecs) >= 5


def test_every_refused_zero_option_is_listed():
    listed = {key for key, _ in support.ZERO_OPTIONS}
    for path, _, _ in REFUSALS:
        section, key, *_ = path.split(".")
        assert section != "zero_optimization" or key in listed, path


def test_an_option_of_deepspeed_is_listed_if_it_is_refused():
    refused = support.zero_exceptions()
    assert all(refused.values()) and '"offload_param": {"device": "nvme"}' in refused
    assert not any(key in refused for key in ('"overlap_comm": true', '"offload_param": {"device": "cpu"}'))
