"""From what people have on disk to batches of tokens.

settings   what can be asked for
formats    a row to the turns of a conversation
encoding   turns to tokens, and which are trained: chat template or prompt style
sources    files, the hub, generators
rows       a row as an example, or why not
corpus     everything encoded, cached, split and mixed
streaming  the same for data that is not read whole
batches    the rows of a step: padded, grouped by length or packed
"""

from llm_lowrank.data.batches import Batches, MicroBatch, StreamBatches, best_fit, collate, training_batches
from llm_lowrank.data.corpus import Corpus, Encoded, Question, load
from llm_lowrank.data.encoding import (
    IGNORE,
    encode,
    encode_messages,
    encode_prompt,
    pad_id,
    style_of,
    tokenizer_of,
    with_template,
)
from llm_lowrank.data.formats import FORMATS, PRESETS, Turn
from llm_lowrank.data.rows import Example
from llm_lowrank.data.settings import Data
from llm_lowrank.data.streaming import Stream

__all__ = [
    "FORMATS",
    "IGNORE",
    "PRESETS",
    "Batches",
    "Corpus",
    "Data",
    "Encoded",
    "Example",
    "MicroBatch",
    "Question",
    "Stream",
    "StreamBatches",
    "Turn",
    "best_fit",
    "collate",
    "encode",
    "encode_messages",
    "encode_prompt",
    "load",
    "pad_id",
    "style_of",
    "tokenizer_of",
    "training_batches",
    "with_template",
]
