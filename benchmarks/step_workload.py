"""Workloads of a training step, from tokens to the optimizer's update, of a small Llama with random weights.

Reading and tokenising are not timed, because they happen once per run.
"""

import functools
from typing import Any, NamedTuple

import torch

from exo import data, models
from exo.data.text import tokenize
from exo.data.text.tokenize import TokenizedExample

LIMITS = tokenize.Limits(10**6, None, "error")
BETA, EPS = 0.1, 1e-3


class Workload(NamedTuple):
    """A batch of `prompts` groups of K completions; lengths are in tokens, with the end of sequence."""

    group_size: int
    prompt: int
    completion: int
    prompts: int = 4
    hidden: int = 256
    layers: int = 4
    vocab: int = 32000
    peers: bool = False  # also run other trainers, which only support pairs

    def __str__(self) -> str:
        return f"K{self.group_size}-{self.prompt}:{self.completion}-V{self.vocab}"

    @property
    def padded_tokens(self) -> int:
        return self.prompts * self.group_size * (self.prompt + self.completion)

    @property
    def shared_tokens(self) -> int:
        return self.prompts * (self.prompt + self.group_size * self.completion)


def workloads(device: str) -> list[Workload]:
    if device == "cuda":
        wide = {"prompts": 8, "hidden": 2048, "layers": 16, "vocab": 128256}
        return [
            Workload(2, 512, 512, peers=True, **wide),
            *(Workload(4, p, 2048 - p, **wide) for p in (512, 1024, 1792)),
        ]
    lengths = ((256, 32), (128, 128), (32, 256))
    # with 10 million parameters: most of them in the head (small D, large V), or most of them in the body
    workloads = [Workload(2, 256, 64, peers=True), Workload(4, 256, 64)]
    workloads.append(Workload(4, 256, 64, hidden=384, layers=6, vocab=4096))
    return workloads + [Workload(k, prompt, answer) for k in (2, 4, 8) for prompt, answer in lengths]


class Problem(NamedTuple):
    work: Workload
    model: Any
    tokenizer: Any
    rows: list[dict[str, Any]]  # texts; pairs if peers take part
    groups: list[TokenizedExample]  # the same texts as tokens


@functools.cache
def _model(hidden: int, layers: int, vocab: int) -> tuple[Any, Any]:
    words = [f"w{i}" for i in range(vocab - 3)]
    heads = max(4, hidden // 64)
    return models.word_level(words, hidden_size=hidden, num_layers=layers, num_heads=heads)


def make(work: Workload, device: str) -> Problem:
    model, tokenizer = _model(work.hidden, work.layers, work.vocab)
    draw = torch.Generator().manual_seed(0)

    def text(n: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(work.vocab - 3, (n,), generator=draw).tolist())

    rows = []
    for _ in range(work.prompts):
        # a leading blank for trainers that concatenate prompt and completion; the last token is the end of sequence
        answers = [f" {text(work.completion - 1)}" for _ in range(work.group_size)]
        row = {"prompt": text(work.prompt), "completions": answers}
        if work.peers:
            row = {"prompt": row["prompt"], "chosen": answers[0], "rejected": answers[1]}
        rows.append(row | ({} if work.peers else {"rewards": torch.rand(work.group_size, generator=draw).tolist()}))
    groups = [
        data.Example(
            row["prompt"],
            (row["chosen"], row["rejected"]) if work.peers else tuple(row["completions"]),
            None if work.peers else tuple(row["rewards"]),
            i,
        )
        for i, row in enumerate(rows, 1)
    ]
    encoded, counts = tokenize.encode(groups, tokenizer, LIMITS, "benchmark")
    assert not counts and all(len(a) == work.completion for group in encoded for a in group.completions)
    return Problem(work, model.to(device), tokenizer, rows, encoded)
