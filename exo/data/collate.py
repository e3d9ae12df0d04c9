"""From tokens to batches: rows of a model's input, and the places in them that make each completion's tokens.

Three layouts. Padded: a row is one completion behind its prompt. Shared: a prompt stands once, its completions after
it, each seeing the prompt and itself alone, and a row holds several such groups. Packed: the same with a prompt for
each completion. Whatever the layout, a batch lists the completions' tokens in one order, so that no loss needs to know
it. Left out: who sees whom, as masks (attention).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from exo.cli import signals
from exo.data.text.tokenize import TokenizedExample

G = TypeVar("G", bound=TokenizedExample)
R = TypeVar("R")


class SegmentIds(NamedTuple):
    """Which tokens of a row see each other: those of one unit, of which a completion sees the prompt and itself."""

    segment: Tensor  # (B, T) int64, -1 on padding
    completion: Tensor  # (B, T) int64, 0 for the prompt, from 1 on its completions
    position_ids: Tensor  # (B, T) int64, as if each completion stood alone behind its prompt


class BlockSpan(NamedTuple):
    """Where a unit stands, and how it is parted."""

    start: int  # in the flattened (B T)
    prompt: int  # tokens
    completions: tuple[int, ...]


class Batch(NamedTuple):
    """Rows of input, N completions of G groups, n tokens of completions."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 on tokens
    segment_ids: SegmentIds | None  # None: a row is one text, and causal attention is right
    spans: tuple[BlockSpan, ...]  # of the units
    rows: Tensor  # (n,) int64: where, in the flattened (B T), each token of a completion is made: one before its own
    targets: Tensor  # (n,) int64: that token
    offsets: Tensor  # (N + 1,) int64: of the completions among the n
    group_size: Tensor  # (G,) int64
    rewards: Tensor | None  # (N,) float64
    ref_logps: Tensor | None  # (N,) float64
    label: Tensor | None  # (G,) int64, the class of a text

    def loss_inputs(self) -> dict[str, Any]:
        """Return the arguments of the losses on hidden states that describe the rows."""
        return {"labels": self.targets, "cu_seqlens": self.offsets, "shift": False}

    def known_ref_logps(self) -> Tensor:  # (N,)
        if self.ref_logps is None:
            raise ValueError("ref_logps: expected groups scored by the reference; got none")
        return self.ref_logps

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(_moved(value, device) for value in self))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, SegmentIds):
        return SegmentIds(*(tensor.to(device) for tensor in value))
    return value.to(device) if isinstance(value, Tensor) else value


class Block(NamedTuple):
    """What stands together in a row: a prompt, and the completions that see it."""

    place: int  # of the group in its batch
    example: TokenizedExample
    completions: Sequence[int]  # of the group

    @property
    def width(self) -> int:
        return len(self.example.prompt) + sum(len(self.example.completions[k]) for k in self.completions)

    def lay_out(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Tokens, positions, parts (each (width,)); and of each completion the places that make its tokens."""
        prompt = len(self.example.prompt)
        ids, positions, parts, places = [*self.example.prompt], [*range(prompt)], [0] * prompt, []
        for k in self.completions:
            answer = self.example.completions[k]
            # the first is made by the prompt's last token, each other by the one before it
            places.append(torch.tensor([prompt - 1, *range(len(ids), len(ids) + len(answer) - 1)]))
            ids += answer
            positions += range(prompt, prompt + len(answer))
            parts += [k + 1] * len(answer)
        return torch.tensor(ids), torch.tensor(positions), torch.tensor(parts), places


class Collator(NamedTuple):
    """How groups become batches: the layout, and how much of it is one forward pass.

    `one_row` is for attention that skips what a mask hides: a batch is one row. Otherwise rows are as long as the
    longest group needs, and others share them where they fit.
    """

    pad_id: int
    max_tokens: int  # of input in a batch, padding included; a group that has more stands alone
    layout: Literal["padded", "packed", "shared"] = "padded"
    one_row: bool = False

    def rows(self, examples: Sequence[TokenizedExample]) -> tuple[list[list[Block]], int]:
        """Rows, and how long they are."""
        units = [
            Block(place, example, part)
            for place, example in enumerate(examples)
            for part in self._parts(len(example.completions))
        ]
        if self.layout == "padded":
            return [[unit] for unit in units], max(unit.width for unit in units)
        if self.one_row:
            return [units], sum(unit.width for unit in units)
        width = max(unit.width for unit in units)
        rows: list[list[Block]] = []
        room: list[int] = []
        for unit in sorted(units, key=lambda unit: -unit.width):  # the longest first, each where it first fits
            row = next((i for i, left in enumerate(room) if left >= unit.width), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(width)
            rows[row].append(unit)
            room[row] -= unit.width
        return rows, width

    def _parts(self, k: int) -> list[Sequence[int]]:
        return [range(k)] if self.layout == "shared" else [(i,) for i in range(k)]

    def tokens(self, examples: Sequence[TokenizedExample]) -> int:
        """Of the batch that they make."""
        rows, width = self.rows(examples)
        return len(rows) * width

    def micro_batches(self, examples: Sequence[G]) -> list[list[G]]:
        """Split a batch so that no part has more than `max_tokens`.

        Sorted by length, so that little is padding; the loss is a sum over groups and does not mind the order.
        """
        parts: list[list[G]] = []
        tokens = 0
        for example in sorted(examples, key=lambda g: (-g.longest, g.line)):
            more = self._with_one_more(parts[-1], tokens, example) if parts else self.max_tokens + 1
            if more <= self.max_tokens:
                parts[-1].append(example)
                tokens = more
            else:
                parts.append([example])
                tokens = self.tokens([example])
        return parts

    def _with_one_more(self, part: Sequence[TokenizedExample], tokens: int, example: TokenizedExample) -> int:
        """Of a part that has so many tokens, and this group, which is no longer than its others; without laying out all
        of them again where no row is shared among units.
        """
        if self.layout == "padded":
            return tokens + len(example.completions) * part[0].longest
        return tokens + self.tokens([example]) if self.one_row else self.tokens([*part, example])

    def each(self, examples: Sequence[G], of: Callable[[list[G]], Sequence[R]]) -> list[R]:
        """What `of` gives for each group, asked a micro-batch at a time; in the order of the groups."""
        found: dict[int, R] = {}
        for part in self.micro_batches(examples):
            signals.raise_if_stop_requested()
            found.update(zip(map(id, part), of(part), strict=True))
        return [found[id(example)] for example in examples]

    def collate(self, examples: Sequence[TokenizedExample]) -> Batch:
        rows, width = self.rows(examples)
        input_ids = torch.full((len(rows), width), self.pad_id)
        position_ids, part = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        units = torch.full_like(input_ids, -1)
        made: dict[tuple[int, int], Tensor] = {}  # of each completion, where its tokens are made
        spans = []
        for i, row in enumerate(rows):
            start = 0
            for number, unit in enumerate(row):
                here = slice(start, start + unit.width)
                ids, positions, parts, places = unit.lay_out()
                input_ids[i, here], position_ids[i, here], part[i, here] = ids, positions, parts
                units[i, here] = number
                answers = tuple(len(unit.example.completions[k]) for k in unit.completions)
                spans.append(BlockSpan(i * width + start, len(unit.example.prompt), answers))
                for k, place in zip(unit.completions, places, strict=True):
                    made[unit.place, k] = i * width + start + place
                start += unit.width
        order = [made[place, k] for place, example in enumerate(examples) for k in range(len(example.completions))]
        return Batch(
            input_ids,
            (units >= 0).long(),
            None if self.layout == "padded" else SegmentIds(units, part, position_ids),
            tuple(spans),
            torch.cat(order),
            torch.tensor([token for example in examples for answer in example.completions for token in answer]),
            torch.tensor([0, *map(len, order)]).cumsum(0),
            torch.tensor([len(example.completions) for example in examples]),
            _column(examples, "rewards"),
            _column(examples, "ref_logps"),
            _labels(examples),
        )


def _column(examples: Sequence[TokenizedExample], name: str) -> Tensor | None:
    values = [getattr(example, name) for example in examples]
    if any(value is None for value in values):
        return None
    return torch.tensor([x for value in values for x in value], dtype=torch.float64)


def _labels(examples: Sequence[TokenizedExample]) -> Tensor | None:
    labels = [example.label for example in examples if example.label is not None]
    return torch.tensor(labels) if len(labels) == len(examples) else None


def split_completions(
    examples: Sequence[TokenizedExample],
    values: Tensor,  # (n,), as a batch lists the completions' tokens
) -> Iterator[list[Tensor]]:
    """For each group of a batch the values of each completion's tokens, (its tokens,)."""
    parts = iter(values.split([len(answer) for example in examples for answer in example.completions]))
    for example in examples:
        yield [next(parts) for _ in example.completions]
