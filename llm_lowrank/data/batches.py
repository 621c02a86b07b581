"""From examples to batches of tokens. One law: the global batch of a step does not depend on the hardware.

A row of a batch is one example, or with packing as many as fit. The examples of a row are kept apart by their
positions, which start at 0 for each example: where transformers gets `position_ids` and no mask, the attention of every
kernel ends at a position 0.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_pt_utils import get_length_grouped_indices

from llm_lowrank.data.corpus import Corpus, ExampleTable
from llm_lowrank.data.encoding import IGNORE
from llm_lowrank.data.rows import Arrays, Example
from llm_lowrank.data.settings import Data
from llm_lowrank.data.streaming import Stream


class MicroBatch(NamedTuple):
    """What one rank computes in one forward."""

    input_ids: Tensor  # (per_device, longest), padded on the right
    attention_mask: Tensor | None  # (per_device, longest); None when packed: position_ids tell the examples apart
    position_ids: Tensor | None  # (per_device, longest), from 0 for every example; None when not packed
    labels: Tensor  # (per_device, longest)
    tokens: int  # trained tokens of the whole global batch: all ranks, all micro-batches
    real: int  # tokens of this micro-batch that are no padding
    samples: tuple[int, ...]  # number of the first example of each row; fewer than per_device when the epoch ran out
    # For rows joined to one, see `inputs`: where the examples begin in it, and its length, int32 (examples + 1,); the
    # tokens of the longest example. Known for packed rows only; a row's padding counts as an example.
    starts: Tensor | None = None
    longest: int = 0

    def pinned(self) -> "MicroBatch":
        """Return the batch in pinned memory, which a CUDA device reads while the host does something else."""
        pinned: dict[str, Any] = {k: v.pin_memory() for k, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(**pinned)

    def inputs(self, device: torch.device, flat: bool = False) -> dict[str, Any]:
        """Return the arguments of the model's forward, on `device`.

        flat: packed rows joined to one row, (1, per_device * longest), for a kernel that tells examples apart by their
        lengths. The lengths go with it: the kernel would read them from the positions, and wait for the device.
        """
        if self.position_ids is None:
            assert self.attention_mask is not None
            tensors = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        shape = (1, -1) if flat else self.input_ids.shape
        tensors = {"input_ids": self.input_ids.reshape(shape), "position_ids": self.position_ids.reshape(shape)}
        inputs: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        if flat:
            assert self.starts is not None
            starts = self.starts.to(device, non_blocking=True)
            inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts)
            inputs |= dict.fromkeys(("max_length_q", "max_length_k"), self.longest)
        return inputs

    def targets(self, flat: bool = False) -> Tensor:
        """Return the labels, in the shape of the inputs, on the host."""
        return self.labels.reshape(1, -1) if flat and self.position_ids is not None else self.labels


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack examples into rows (best fit, longest first): return the indices of each row. The lengths in a row add up to
    `capacity` at most.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # room left -> rows
    rooms: list[int] = []  # the keys of with_room that have rows, sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        assert 0 < length <= capacity, (index, length, capacity)
        # the fullest row with room for this example, or a new row
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        # the row is filed again under the room that it has now
        if left := room - length:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(row)
    return rows


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


class Batches:
    """This rank's micro-batches of any optimizer step, computed from the step's number alone.

        global batch of step t = permutation(seed, t div S)[(t mod S) G : (t mod S + 1) G],
        G = per_device * accumulation * world,  S = ceil(rows / G) steps in an epoch

    The rows of a global batch are dealt out to the ranks in turn. The last batch of an epoch is filled up with empty
    rows (one token, no label): all ranks run the same number of forwards, and no sample comes twice in an epoch. The
    loss of a step is the loss summed over its tokens, divided by MicroBatch.tokens.

    per_device, accumulation: rows of a micro-batch and micro-batches of a step, on each rank. epochs: only total_steps
    depends on it, step() goes on for ever. pack: tokens in a row of several examples; 0: one example a row. grouped:
    examples of about the same length share a batch. ValueError if there are no examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        per_device: int,
        *,
        pad_id: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        epochs: float = 1.0,
        pack: int = 0,
        grouped: bool = False,
    ) -> None:
        if not len(examples):
            raise ValueError("there are no examples to make batches of")
        assert 0 <= rank < world
        self.examples, self.per_device, self.accumulation = examples, per_device, accumulation
        self.rank, self.world, self.seed, self.pad_id = rank, world, seed, pad_id
        self.pack, self.grouped = pack, grouped
        self.arrays: Callable[[int], Arrays]
        if isinstance(examples, ExampleTable):
            self.arrays, trained, self.lengths = examples.arrays, examples.trained, examples.lengths
        else:
            self.arrays = [example.arrays for example in examples].__getitem__
            trained = np.array([example.trained for example in examples])
            self.lengths = np.array([len(example.input_ids) for example in examples])
        # rows: (rows,) examples each; without packing row i is example i
        self.packs = best_fit(self.lengths.tolist(), pack) if pack else None
        self.rows = len(self.packs) if self.packs else len(examples)
        self.trained = np.array([trained[row].sum() for row in self.packs]) if self.packs else trained
        self.ordered: tuple[int, np.ndarray] | None = None  # an epoch and its order of rows, grouped by length
        self.global_batch = per_device * accumulation * world
        self.steps_per_epoch = ceil(self.rows / self.global_batch)
        self.total_steps = ceil(epochs * self.steps_per_epoch)

    def step(self, t: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of step t, `accumulation` of them."""
        epoch, position = divmod(t, self.steps_per_epoch)
        # the rows of the global batch, then this rank's share of them, then its micro-batches
        batch = self._order(epoch)[position * self.global_batch : (position + 1) * self.global_batch]
        tokens = int(self.trained[batch].sum())
        share = batch[self.rank :: self.world].tolist()
        micro_rows = [share[k * self.per_device : (k + 1) * self.per_device] for k in range(self.accumulation)]
        return [self._collate(rows, tokens) for rows in micro_rows]

    def _order(self, epoch: int) -> np.ndarray:
        """Return the rows in the order of an epoch, (rows,)."""
        if not self.grouped:
            return _permutation(self.rows, self.seed, epoch)
        ordered = self.ordered  # read once: a calibration and the thread of run/ahead.py may be in different epochs
        if ordered is None or ordered[0] != epoch:
            # random stretches of many global batches, each sorted by length: the order is drawn anew in every epoch
            rng = torch.Generator().manual_seed(int(np.random.default_rng([self.seed, epoch]).integers(2**62)))
            indices = get_length_grouped_indices(self.lengths.tolist(), self.global_batch, generator=rng)
            self.ordered = ordered = epoch, np.array(indices)
        return ordered[1]

    def _collate(self, rows: list[int], tokens: int) -> MicroBatch:
        members = [self.packs[row] if self.packs else [row] for row in rows]
        return collate(
            [[self.arrays(index) for index in indices] for indices in members],
            self.per_device,
            pad_id=self.pad_id,
            tokens=tokens,
            samples=tuple(indices[0] for indices in members),
            packed=self.packs is not None,
        )


class StreamBatches:
    """Batches over a stream: the global batch of step t is the stream's examples t G .. (t + 1) G - 1."""

    def __init__(
        self,
        stream: Stream,
        per_device: int,
        *,
        pad_id: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.stream, self.per_device, self.accumulation = stream, per_device, accumulation
        self.rank, self.world, self.pad_id = rank, world, pad_id
        self.global_batch = per_device * accumulation * world
        self.next = 0  # the step whose examples come next from self.examples
        self.examples = stream.examples()

    def again(self) -> "StreamBatches":
        """Return the same batches over a second reading of the stream, which the counts of this one do not see."""
        return StreamBatches(
            self.stream.again(),
            self.per_device,
            pad_id=self.pad_id,
            accumulation=self.accumulation,
            rank=self.rank,
            world=self.world,
        )

    @property
    def total_steps(self) -> int:
        """Raise ValueError: the number of steps in an epoch is not known."""
        raise ValueError("data.streaming: how long the data is cannot be known; set max_steps")

    def step(self, t: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of step t. A step out of turn reads the stream from its beginning."""
        if t != self.next:
            self.examples = islice(self.stream.examples(), t * self.global_batch, None)
        self.next = t + 1
        batch = list(islice(self.examples, self.global_batch))
        tokens = sum(example.trained for example in batch)
        numbers = range(t * self.global_batch, (t + 1) * self.global_batch)[self.rank :: self.world]
        share = batch[self.rank :: self.world]
        return [
            collate(
                [[share[i].arrays] for i in range(k * self.per_device, (k + 1) * self.per_device)],
                self.per_device,
                pad_id=self.pad_id,
                tokens=tokens,
                samples=tuple(numbers[k * self.per_device : (k + 1) * self.per_device]),
            )
            for k in range(self.accumulation)
        ]


def training_batches(
    corpus: Corpus,
    settings: Data,
    *,
    per_device: int,
    accumulation: int,
    rank: int,
    world: int,
    seed: int,
    pad_id: int,
    epochs: float,
) -> Batches | StreamBatches:
    """Return the batches that a run is trained on, packed, grouped or from a stream as the settings say."""
    if isinstance(corpus.train, Stream):
        return StreamBatches(corpus.train, per_device, pad_id=pad_id, accumulation=accumulation, rank=rank, world=world)
    return Batches(
        corpus.train,
        per_device,
        pad_id=pad_id,
        accumulation=accumulation,
        rank=rank,
        world=world,
        seed=seed,
        epochs=epochs,
        pack=settings.max_length if settings.packing else 0,
        grouped=settings.group_by_length,
    )


def collate(
    rows: Sequence[Sequence[Arrays]],
    per_device: int,
    *,
    pad_id: int,
    tokens: int,
    samples: tuple[int, ...],
    packed: bool = False,
) -> MicroBatch:
    """Return rows of examples as tensors (per_device, longest), filled up with empty rows.

    tokens, samples: as in MicroBatch. packed: the examples of a row are told apart by their positions, not by a mask.
    """
    # The one token of an empty row is attended to: a row that attends to nothing would be NaN.
    empty = [Example([pad_id], [IGNORE]).arrays]
    filled = [*rows, *[empty] * (per_device - len(rows))]
    lengths = np.array([sum(len(ids) for ids, _ in row) for row in filled])
    shape = (per_device, int(lengths.max()))
    input_ids, labels = (np.full(shape, filler, dtype=np.int64) for filler in (pad_id, IGNORE))
    # the padding is an example of its own
    places = np.arange(shape[1])
    position_ids = np.where(places < lengths[:, None], 0, places - lengths[:, None])
    for number, row in enumerate(filled):
        start = 0
        for ids, wanted in row:
            end = start + len(ids)
            input_ids[number, start:end] = ids
            labels[number, start:end] = wanted
            if packed:
                labels[number, start] = IGNORE  # another example stands before this token and cannot predict it
                position_ids[number, start:end] = places[: end - start]
            start = end
    starts = np.append(np.flatnonzero(position_ids == 0), position_ids.size).astype(np.int32) if packed else None
    return MicroBatch(
        torch.from_numpy(input_ids),
        None if packed else torch.from_numpy((places < lengths[:, None]).astype(np.int64)),
        torch.from_numpy(position_ids) if packed else None,
        torch.from_numpy(labels),
        tokens,
        int(lengths[: len(rows)].sum()),
        samples,
        None if starts is None else torch.from_numpy(starts),
        0 if starts is None else int(np.diff(starts).max()),
    )
