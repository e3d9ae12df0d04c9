"""Scaling of the linear path with tokens and K, and its memory at a large vocabulary: cases, rows, targets, table."""

from typing import Any

import torch

from benchmarks import report
from benchmarks.linear_workload import EXO, Workload
from benchmarks.logits_workload import MIB
from benchmarks.measure import Memory, Time
from benchmarks.report import Target, spread

SUITE = "linear scaling"
MEMORY, TOKENS, COMPLETIONS = "memory", "tokens", "completions"
TOKEN_COUNTS = [2**i for i in range(10, 16)]
GROUP_SIZES = [2, 4, 8, 16, 32, 64]
OVER_BUDGET, OF_LOGITS = 1.10, 1 / 8  # extra peak
GROWTH = 1.10  # of the time per token and of the extra peak, from the fewest to the most tokens
K_SPREAD = 0.10


def memory_case(device: str) -> Workload:
    """Return a case of 8192 rows with loss, whose fp32 logits are 4.6 GiB. A group of 256 rows fits into a chunk."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return Workload(128, 128, 256, 151936, dtype, EXO, 4, 256 * MIB)


def token_cases(device: str) -> list[Workload]:
    """Return cases that differ in tokens. The budget holds a chunk of 512 rows, so that every case fills it."""
    hidden, vocab, dtype, budget = 256, 32000, torch.float32, 80 * MIB
    if device == "cuda":
        hidden, vocab, dtype, budget = 2048, 128256, torch.bfloat16, 512 * MIB
    return [Workload(tokens // 128, 128, hidden, vocab, dtype, EXO, 4, budget) for tokens in TOKEN_COUNTS]


def group_cases(device: str) -> list[Workload]:
    """Return cases of 64 sequences that differ in K. The largest group fits into a chunk."""
    hidden, vocab, dtype, budget = 256, 32000, torch.float32, 512 * MIB
    if device == "cuda":
        hidden, vocab, dtype, budget = 2048, 128256, torch.bfloat16, 2048 * MIB
    return [Workload(64, 64, hidden, vocab, dtype, EXO, k, budget) for k in GROUP_SIZES]


def row(kind: str, work: Workload, times: list[Time], memory: Memory | None) -> dict[str, Any]:
    seconds = [t.seconds for t in times]
    result: dict[str, Any] = {
        "suite": SUITE, "workload": kind, "group_size": work.group_size, "sequences": work.sequences,
        "length": work.length, "hidden": work.hidden, "vocab": work.vocab,
        "dtype": str(work.dtype).removeprefix("torch."), "budget_bytes": work.budget,
        "rows": work.rows, "rows_with_loss": work.rows_with_loss,
        "seconds": spread(seconds), "rounds_seconds": seconds,
    }  # fmt: skip
    if memory is None:
        return result
    logits = work.rows_with_loss * work.vocab * 4
    return result | {
        "extra_bytes": memory.extra, "extra_bytes_allocated": memory.allocated, "extra_bytes_resident": memory.resident,
        "fp32_logits_bytes": logits, "extra_of_fp32_logits": memory.extra / logits,
    }  # fmt: skip


def memory_targets(work: Workload, row: dict[str, Any]) -> list[Target]:
    """Return the targets of memory. A 16-bit head may also keep an fp32 gradient of the weight."""
    allowed = 0 if work.dtype == torch.float32 else work.weight_bytes
    extra = row["extra_bytes"] - allowed
    return [
        Target("extra / budget", extra / work.budget, OVER_BUDGET, False),
        Target("extra / fp32 logits", extra / row["fp32_logits_bytes"], OF_LOGITS, False),
    ]


def token_targets(rows: list[dict[str, Any]]) -> list[Target]:
    """Return the targets of growth, from the fewest to the most tokens, round by round. There is no lower limit."""
    few, many = rows[0], rows[-1]
    tokens = many["rows"] / few["rows"]
    pairs = zip(few["rounds_seconds"], many["rounds_seconds"], strict=True)
    growth = spread([b / a / tokens for a, b in pairs])["median"]
    return [
        Target(f"time a token, x {tokens:.0f} tokens", growth, GROWTH, False),
        Target(f"extra, x {tokens:.0f} tokens", many["extra_bytes"] / few["extra_bytes"], GROWTH, False),
    ]


def group_targets(rows: list[dict[str, Any]]) -> list[Target]:
    first = rows[0]["rounds_seconds"]
    ratios = [spread([b / a for a, b in zip(first, row["rounds_seconds"], strict=True)])["median"] for row in rows[1:]]
    worst = max(abs(ratio - 1) for ratio in ratios)
    return [Target(f"time off K = {rows[0]['group_size']}, at most", worst, K_SPREAD, False)]


def block(block: list[dict[str, Any]]) -> list[str]:
    """Return the table of one case."""
    first = block[0]
    title = {
        MEMORY: "EXO from hidden states, memory",
        TOKENS: "EXO from hidden states, more and more tokens",
        COMPLETIONS: "EXO from hidden states, K completions of as many tokens in all",
    }[first["workload"]]
    lines = [
        "",
        f"{title}: D={first['hidden']} V={first['vocab']} {first['dtype']}, half of the tokens prompt, budget "
        f"{first['budget_bytes'] / MIB:.0f} MiB; {len(first['rounds_seconds'])} rounds",
        f"{'tokens':>8}{'K':>5}{'ms':>10} {'(min..max)':>18}{'us/token':>10}{'extra MiB':>11}{'/fp32 logits':>13}",
    ]
    for row in block:
        s = row["seconds"]
        spread_ms = f"({1e3 * s['min']:.5g}..{1e3 * s['max']:.5g})"
        line = f"{row['rows']:8}{row['group_size']:5}{1e3 * s['median']:10.5g} {spread_ms:>18}"
        line += f"{1e6 * s['median'] / row['rows']:10.4g}"
        if "extra_bytes" in row:
            line += f"{row['extra_bytes'] / MIB:11.1f}{row['extra_of_fp32_logits']:13.4f}"
        lines.append(line)
    return lines + report.verdicts(block)
