"""From datasets to batches of tokens. Code in here knows rows, text and tokens. It knows no model, engine or method:
asking a model and scoring its answers belongs to models/ and evaluation/.

settings   the settings of the section `data`
columns    names that change what is learned: which are used and which are refused
formats    from a row to the turns of a conversation
templates  conversations written with a chat template, and what the template leaves out
encoding   from turns to tokens and which of them are trained, by a chat template or a prompt style
tokens     rows that are tokens already
reading    from the bytes of a file to its rows, without types
finding    which files a name stands for: paths, URLs, the hub, subsets and splits
sources    datasets with their rows, from files, the hub and generators
limits     what a model can take: tokens of its embedding, positions that it has learned
stops      what ends an answer
rows       from a row to an example, or to the reason why there is none
workers    rows become tokens in several processes
corpus     all datasets encoded, cached, split and mixed
streaming  examples of a dataset that is read while a run trains on it
batches    the rows of a step: padded, grouped by length or packed
"""

from llm_lowrank.data.batches import Batches, MicroBatch, StreamBatches, best_fit, collate, training_batches
from llm_lowrank.data.columns import describe_unused
from llm_lowrank.data.corpus import Corpus, ExampleTable, Question, load_corpus
from llm_lowrank.data.encoding import (
    IGNORE,
    encode_messages,
    encode_prompt,
    encode_turns,
    pad_id,
    style_of,
    tokenizer_of,
    with_template,
)
from llm_lowrank.data.formats import FORMATS, PRESETS, Turn
from llm_lowrank.data.limits import Limits
from llm_lowrank.data.rows import Example
from llm_lowrank.data.settings import Data
from llm_lowrank.data.stops import describe_ends
from llm_lowrank.data.streaming import Stream

__all__ = [
    "FORMATS",
    "IGNORE",
    "PRESETS",
    "Batches",
    "Corpus",
    "Data",
    "Example",
    "ExampleTable",
    "Limits",
    "MicroBatch",
    "Question",
    "Stream",
    "StreamBatches",
    "Turn",
    "best_fit",
    "collate",
    "describe_ends",
    "describe_unused",
    "encode_messages",
    "encode_prompt",
    "encode_turns",
    "load_corpus",
    "pad_id",
    "style_of",
    "tokenizer_of",
    "training_batches",
    "with_template",
]
