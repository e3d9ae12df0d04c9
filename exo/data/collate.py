"""Collate tokenized examples into batches.

There are three layouts. Padded: a row is a prompt and one completion. Shared: a row has several blocks, each a prompt
and its completions, which attend to the prompt and themselves. Packed: the same with one completion per block. Every
layout lists the completions' tokens in the same order, so losses do not depend on it. models/attention makes the masks.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from exo.data.text.tokenize import TokenizedExample

E = TypeVar("E", bound=TokenizedExample)


class SegmentIds(NamedTuple):
    """The block and the completion of each token: a completion attends to the prompt of its block and to itself."""

    segment: Tensor  # (B, T) int64, the block in its row; -1 on padding
    completion: Tensor  # (B, T) int64, 0 for the prompt, from 1 on its completions
    position_ids: Tensor  # (B, T) int64, as if each completion were alone after its prompt


class BlockSpan(NamedTuple):
    start: int  # in the flattened (B T)
    prompt: int  # tokens
    completions: tuple[int, ...]  # tokens of each


class Batch(NamedTuple):
    """Rows of input with N completions of G examples; the completions have n tokens together."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 on tokens
    segment_ids: SegmentIds | None  # None: a row is one text with causal attention
    spans: tuple[BlockSpan, ...]
    rows: Tensor  # (n,) int64: index in the flattened (B T) that predicts each token of a completion
    targets: Tensor  # (n,) int64: that token
    offsets: Tensor  # (N + 1,) int64: of the completions among the n
    group_size: Tensor  # (G,) int64
    rewards: Tensor | None  # (N,) float64
    ref_logps: Tensor | None  # (N,) float64
    label: Tensor | None  # (G,) int64, the class of a text

    def loss_inputs(self) -> dict[str, Any]:
        """Return the arguments that describe the rows to the losses on hidden states."""
        return {"labels": self.targets, "cu_seqlens": self.offsets, "shift": False}

    def required_ref_logps(self) -> Tensor:  # (N,)
        """Return the reference log-probs; raise ValueError without them."""
        if self.ref_logps is None:
            raise ValueError("ref_logps: expected examples scored by the reference; got none")
        return self.ref_logps

    def to(self, device: torch.device) -> "Batch":
        def move(value: Any) -> Any:
            if isinstance(value, SegmentIds):
                return SegmentIds(*map(move, value))
            return value.to(device) if isinstance(value, Tensor) else value

        return Batch(*map(move, self))


class Block(NamedTuple):
    """A prompt and completions after it, contiguous in a row."""

    example_index: int  # in its batch
    example: TokenizedExample
    completions: Sequence[int]  # of the example

    @property
    def width(self) -> int:
        return len(self.example.prompt) + sum(len(self.example.completions[k]) for k in self.completions)

    def lay_out(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Return ids, positions and completion ids, each (width,), and per completion the positions that predict it."""
        prompt = len(self.example.prompt)
        ids, positions, completion_ids = [*self.example.prompt], [*range(prompt)], [0] * prompt
        predictors = []
        for k in self.completions:
            completion = self.example.completions[k]
            # the prompt's last token predicts the first token, the token before it each other one
            predictors.append(torch.tensor([prompt - 1, *range(len(ids), len(ids) + len(completion) - 1)]))
            ids += completion
            positions += range(prompt, prompt + len(completion))
            completion_ids += [k + 1] * len(completion)
        return torch.tensor(ids), torch.tensor(positions), torch.tensor(completion_ids), predictors


class Collator(NamedTuple):
    """Makes batches of one layout, each for one forward pass.

    `one_row`: a batch is one row, for attention that skips masked blocks. Otherwise rows are as long as the longest
    block, and shorter blocks share rows.
    """

    pad_id: int
    max_tokens: int  # of a batch, padding included; a longer example is a batch alone
    layout: Literal["padded", "packed", "shared"] = "padded"
    one_row: bool = False

    def rows(self, examples: Sequence[TokenizedExample]) -> tuple[list[list[Block]], int]:
        """Return the blocks of each row, and the length of the rows."""
        blocks = []
        for i, example in enumerate(examples):
            k = len(example.completions)
            parts: list[Sequence[int]] = [range(k)] if self.layout == "shared" else [(j,) for j in range(k)]
            blocks += [Block(i, example, part) for part in parts]
        if self.one_row and self.layout != "padded":
            return [blocks], sum(block.width for block in blocks)
        width = max(block.width for block in blocks)
        if self.layout == "padded":
            return [[block] for block in blocks], width
        rows: list[list[Block]] = []
        room: list[int] = []
        for block in sorted(blocks, key=lambda block: -block.width):  # first fit, the longest first
            row = next((i for i, free in enumerate(room) if free >= block.width), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(width)
            rows[row].append(block)
            room[row] -= block.width
        return rows, width

    def tokens(self, examples: Sequence[TokenizedExample]) -> int:
        """Return the size of the batch of these examples, padding included."""
        rows, width = self.rows(examples)
        return len(rows) * width

    def micro_batches(self, examples: Sequence[E]) -> list[list[E]]:
        """Split a batch into parts of at most `max_tokens`.

        They are sorted by length, which saves padding. The loss is a sum over examples, so their order is free.
        """
        parts: list[list[E]] = []
        tokens = 0
        for example in sorted(examples, key=lambda example: (-example.longest, example.line)):
            tokens = self._size_with(parts[-1], tokens, example) if parts else self.max_tokens + 1
            if tokens <= self.max_tokens:
                parts[-1].append(example)
            else:
                parts.append([example])
                tokens = self.tokens([example])
        return parts

    def _size_with(self, part: Sequence[TokenizedExample], tokens: int, example: TokenizedExample) -> int:
        """Return the size of a part of size `tokens` with one more example, which is no longer than the others."""
        if self.layout == "padded":
            return tokens + len(example.completions) * part[0].longest
        return tokens + self.tokens([example]) if self.one_row else self.tokens([*part, example])

    def collate(self, examples: Sequence[TokenizedExample]) -> Batch:
        """Return the batch of these examples."""
        rows, width = self.rows(examples)
        input_ids = torch.full((len(rows), width), self.pad_id)  # (B, T)
        position_ids, completion_ids = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        segments = torch.full_like(input_ids, -1)
        predictors: dict[tuple[int, int], Tensor] = {}  # by example and completion
        spans = []
        for i, row in enumerate(rows):
            start = 0
            for number, block in enumerate(row):
                columns = slice(start, start + block.width)
                input_ids[i, columns], position_ids[i, columns], completion_ids[i, columns], positions = block.lay_out()
                segments[i, columns] = number
                lengths = tuple(len(block.example.completions[k]) for k in block.completions)
                spans.append(BlockSpan(i * width + start, len(block.example.prompt), lengths))
                for k, position in zip(block.completions, positions, strict=True):
                    predictors[block.example_index, k] = i * width + start + position
                start += block.width
        order = [predictors[i, k] for i, example in enumerate(examples) for k in range(len(example.completions))]
        labels = [example.label for example in examples if example.label is not None]
        return Batch(
            input_ids,
            (segments >= 0).long(),
            None if self.layout == "padded" else SegmentIds(segments, completion_ids, position_ids),
            tuple(spans),
            torch.cat(order),
            torch.tensor([token for example in examples for ids in example.completions for token in ids]),
            torch.tensor([0, *map(len, order)]).cumsum(0),
            torch.tensor([len(example.completions) for example in examples]),
            _column([example.rewards for example in examples]),
            _column([example.ref_logps for example in examples]),
            torch.tensor(labels) if len(labels) == len(examples) else None,
        )


def _column(rows: Sequence[Sequence[float] | None]) -> Tensor | None:
    """Return the values of all completions, (N,); None if an example has none."""
    values = [value for row in rows if row is not None for value in row]
    return None if any(row is None for row in rows) else torch.tensor(values, dtype=torch.float64)


def split_completions(
    examples: Sequence[TokenizedExample],
    values: Tensor,  # (n,), as a batch lists the completions' tokens
) -> Iterator[list[Tensor]]:
    """Yield for each example the values of each completion's tokens, (its tokens,)."""
    parts = iter(values.split([len(ids) for example in examples for ids in example.completions]))
    for example in examples:
        yield [next(parts) for _ in example.completions]
