"""NEFTune: uniform noise on the embeddings of training samples.  https://arxiv.org/abs/2310.05914 algorithm 1

    x' = x + alpha / sqrt(L d) e          x (L, d) the embeddings of a sample of L tokens, e uniform in [-1, 1]

L is the sample's own length, as in the authors' training code; transformers and TRL take the length of the padded row.
Padding gets no noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def noisy(model: PreTrainedModel, alpha: float, mask: Tensor | None) -> Iterator[None]:
    """Within this block a forward adds the noise to the output of the embedding. alpha 0: nothing changes.

    mask (batch, length): 1 for the tokens of a sample, 0 for padding; one sample in each row. The noise comes from the
    device's own generator, as dropout's does.
    """
    if not alpha:
        yield
        return
    assert mask is not None, "the noise depends on the length of each sample, and packed rows have several"

    def add(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        tokens = mask.to(output.device, torch.float32)
        sizes = alpha / (tokens.sum(1) * output.shape[-1]).clamp_min(1).sqrt()  # (batch,)
        noise = torch.empty(output.shape, dtype=torch.float32, device=output.device).uniform_(-1, 1)
        return output + (noise * (tokens * sizes[:, None])[..., None]).to(output.dtype)

    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
