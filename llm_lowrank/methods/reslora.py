"""ResLoRA, block shortcut: a layer adds its own pairs and those of the layers before it.
https://arxiv.org/abs/2402.18039

    y_l = W_l x + s (B_l A_l + B_(l-1) A_(l-1) + ... + B_(l-p) A_(l-p)) x

    A_l (r, n), B_l (m, r)    of layer l, trained; used by layers l .. l + p of its kind          p = `previous`

The first layers have fewer layers before them. A layer's change has rank r (p + 1), and the gradient of a block of
pairs is the sum over the p + 1 layers that use it. With p = 0 this is LoRA.

The paper's other shortcuts read activations of the layer before, so that no weight can stand for them: see the card.
The published code (res_flag 2) computes the block shortcut as here, but with a dropout mask for each block, where a
layer has one here. It neither merges nor exports this shortcut.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, Shared, Whole, fill_, generator, uniform_rows
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.methods.lora import LoRA, second_group
from llm_lowrank.methods.rasa import Kind, kind
from llm_lowrank.numerics.functional import Product, adapter_linear
from llm_lowrank.numerics.pairs import Pairs


class Block(Shared):
    """The pairs of one layer, A (r, n) and B (m, r), which the next layers of its kind use too."""

    def __init__(self, layer: BlockLayer) -> None:
        super().__init__()
        (m, n), self.name, self.seed = layer.shape, layer.name, layer.seed
        self.A, self.B = layer.factor(layer.rank, n), layer.factor(m, layer.rank)
        fill_(self)

    def initial(self) -> dict[str, Tensor]:
        (r, n), m = self.A.shape, len(self.B)
        with torch.device("cpu"):
            return {"A": uniform_rows(r, n, generator(self.seed, self.name)), "B": torch.zeros(m, r)}


class BlockLayer(Adapter):
    """A frozen linear that adds the products of the blocks which it borrows, its own block first."""

    def __init__(
        self, name: str, linear: nn.Linear, codec: Codec, *, rank: int, scale: float, dropout: float, seed: int
    ) -> None:
        super().__init__(name, linear, codec, seed)
        self.rank, self.scale, self.dropout = rank, scale, dropout

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values: none, as the blocks have all that is trained."""
        assert pairs is None, "ResLoRA takes no pairs out of W"
        return {}

    @property
    def blocks(self) -> list[Block]:
        """The layer's own block, and those of the layers before it, the nearest first."""
        return [lender for lender in self.borrows if isinstance(lender, Block)]

    @torch.compiler.disable  # Shared.read asks autograd which backward is running
    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else None
        # one product for each block: joined factors would be copies, kept for the backward of every layer
        products = []
        for i, block in enumerate(self.blocks):
            products.append(Product(block.read("A", first=i == 0), block.read("B", first=i == 0)))
        return adapter_linear(
            x,
            self.parts(),
            decode=self.decode,
            products=products,
            scale=self.scale,
            bias=self.bias,
            dropped=dropped,
            multiply=self.multiply(x),
        )

    def change(self, whole: Whole) -> Pairs:
        """s [B_l, B_(l-1), ...] and [A_l; A_(l-1); ...]. Collective."""
        return Pairs.cat([Pairs(whole(block.B), whole(block.A)) for block in self.blocks]).scaled(self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}, blocks={len(self.borrows)}"


@Method.register_subclass("reslora")
@dataclass(frozen=True)
class ResLoRA(LoRA):
    """Train rank pairs per module, which the next modules of its kind use too."""

    previous: int = 1
    """Layers before it whose pairs a layer uses beside its own (the published code's pre_num); -1: all."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if self.previous < -1:
            complaints.append(f"method.previous must be -1 (all layers before) or at least 0, not {self.previous}")
        return complaints

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> BlockLayer:
        rank = self.rank_of(name)
        self.check_fits("rank", rank, name, linear)
        return BlockLayer(name, linear, codec, rank=rank, scale=self.scale_of(name), dropout=self.dropout, seed=seed)

    def link(self, model: nn.Module, adapters: list[Adapter]) -> None:
        kinds: dict[Kind, list[BlockLayer]] = defaultdict(list)
        blocks: dict[str, Block] = {}
        for adapter in adapters:
            assert isinstance(adapter, BlockLayer)
            kinds[(kind(adapter.name), *adapter.shape)].append(adapter)
            blocks[adapter.name] = Block(adapter)
        for layers in kinds.values():
            self._check_scales(layers)
            for i, layer in enumerate(layers):
                first = 0 if self.previous < 0 else max(0, i - self.previous)
                layer.borrows = tuple(blocks[used.name] for used in layers[first : i + 1][::-1])
        if self.b_rate != 1:
            for block in blocks.values():
                block.groups = second_group(block)
        model.reslora_blocks = nn.ModuleList(blocks.values())  # the root owns them, no layer does
        super().link(model, adapters)

    def _check_scales(self, layers: list[BlockLayer]) -> None:
        other = next((layer for layer in layers if layer.scale != layers[0].scale), None)
        if self.previous and other is not None:
            raise ValueError(
                f"{layers[0].name} has the scale {layers[0].scale:g} and {other.name} the scale {other.scale:g}, but "
                "layers of one type use each other's pairs; in method.alpha_pattern and method.rank_pattern, give all "
                "layers of a type the same alpha and rank"
            )
