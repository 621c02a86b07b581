"""New tokens, and tokens whose rows are trained: from their names to the modules that train the rows.

See adapters/tokens.py for the equations. The tokenizer gets the new tokens, a model trained rows for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.tokens import TokenEmbedding, TokenHead, TokenRows, TrainedTokens, is_lookup

Start = Literal["mean", "pieces"]


def add_tokens(tokenizer: PreTrainedTokenizerBase, new: Sequence[str]) -> PreTrainedTokenizerBase:
    """Add tokens to a tokenizer and return it. They are cut out of every text as they stand, and stay in answers.

    ValueError if one is a token already.
    """
    known = tokenizer.get_vocab()
    if old := next((token for token in new if token in known), None):
        raise ValueError(
            f"new_tokens: {old!r} is a token of this tokenizer already, number {known[old]}; name it in trained_tokens"
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    return tokenizer


def find_tokens(
    tokenizer: PreTrainedTokenizerBase, rows: int, *, new: Sequence[str], trained: Sequence[str], start: Start = "mean"
) -> TrainedTokens:
    """Return the tokens whose rows are trained, and add the new ones to the tokenizer.

    rows: of the model's embedding. ValueError if a new token exists, or if one to train does not.
    """
    if not new and not trained:
        return TrainedTokens(rows, {}, frozenset())
    pieces = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in new}
    known = add_tokens(tokenizer, new).get_vocab()
    wanted = {_number(tokenizer, known, token): token for token in trained}
    fresh = {known[token]: token for token in new}
    wanted |= fresh
    # a token that the tokenizer had and the embedding has not, mostly one for padding, gets a row too
    for token in range(rows, max([rows, *(token + 1 for token in wanted)])):
        wanted.setdefault(token, str(tokenizer.convert_ids_to_tokens(token)))
    beyond = {token for token in wanted if token >= rows}
    started = {known[token]: found for token, found in pieces.items()} if start == "pieces" else {}
    if strange := next((token for token, found in started.items() if not found or max(found) >= rows), None):
        raise ValueError(
            f"new_tokens_start: pieces: the tokenizer has no pieces with rows for {fresh[strange]!r}; use mean"
        )
    return TrainedTokens(rows, dict(sorted(wanted.items())), frozenset(beyond | set(fresh)), started)


def _number(tokenizer: PreTrainedTokenizerBase, known: dict[str, int], token: str) -> int:
    """The number of a token that is given by its text or as the vocabulary writes it (Ġhello)."""
    if token in known:
        return known[token]
    ids: list[int] = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    found = " ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
    raise ValueError(
        f"trained_tokens: {token!r} is no token of this tokenizer, which cuts it into {found}; name it in new_tokens "
        "to make it one"
    )


def train_rows(model: PreTrainedModel, adapters: Sequence[Adapter], tokens: TrainedTokens) -> TokenRows:
    """Train these rows of the embedding and of the output layer of a model whose adapters are attached.

    ValueError if the model's layers cannot have such rows.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(head, Adapter):
        raise ValueError(
            f"new_tokens, trained_tokens: the method adapts {head.name}, the output layer, whose rows they train; "
            "leave it out of method.target_modules, and with method.type: losia set method.output_factor: 0"
        )
    if not is_lookup(embedding):
        raise ValueError(
            f"new_tokens, trained_tokens: the embedding of {type(model).__name__} is a {type(embedding).__name__}, "
            "whose rows cannot be trained here"
        )
    if not isinstance(head, nn.Linear) or len(head.weight) != tokens.rows:
        raise ValueError(
            f"new_tokens, trained_tokens: the output layer of {type(model).__name__} is a {type(head).__name__} that "
            f"has no row for each of the {tokens.rows} tokens of the embedding"
        )
    if head.bias is not None and tokens.size > tokens.rows:
        raise ValueError(
            f"new_tokens: {names[head]} has a bias, in which new tokens would have no place; use reserved tokens of "
            "the model, as trained_tokens"
        )
    matrices: dict[str, tuple[str, Tensor]] = {"embedding": (names[embedding], embedding.weight)}
    if head.weight is not embedding.weight:
        matrices["output"] = (names[head], head.weight)
    rows = TokenRows(tokens, matrices)
    for module, layer in ((embedding, TokenEmbedding(embedding, rows)), (head, TokenHead(head, rows))):
        parent, _, leaf = names[module].rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    model.token_rows = rows  # the root owns the rows, so that every engine gathers them for both layers
    model.config.get_text_config(decoder=True).vocab_size = tokens.size
    return rows


def token_rows(model: nn.Module) -> TokenRows | None:
    """The trained rows of a model, if it has any."""
    return next((module for module in model.modules() if isinstance(module, TokenRows)), None)
