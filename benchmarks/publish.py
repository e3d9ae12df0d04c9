"""Write the measured figures into the pages: `python -m benchmarks.publish`; a test runs it with `--check`.

A page marks a place with `<!-- figures: NAME -->` and `<!-- end -->`. What stands between comes from results/*.json.
Where there are several kinds of machines, or both allocators were measured, a ratio in a sentence is the smallest.
"""

import argparse
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import peers, table
from benchmarks.harness import BOUND, EAGER, MIB, OURS, PADDED
from benchmarks.linear import EAGER_ROWS, FROZEN
from benchmarks.logits import COMPILED
from benchmarks.machine import ROOT

RESULTS = Path(__file__).parent / "results"
PAGES = ("README.md", "docs/performance.md", "docs/limitations.md", "benchmarks/README.md")
LOGITS, LOGITS_LARGE = "logits/V32000-n512-float32-half", "logits/V151936-n256-float32-half"
EXO, DPO = "linear/EXO-D512-V32000-n1024-K4-float32", "linear/DPO-D512-V32000-n1024-K2-float32"
LOGPS, EXO_BF16 = "linear/log-probs-D512-V32000-n1024-K4-float32", "linear/EXO-D512-V32000-n1024-K4-bfloat16"
LARGE = "linear/EXO-D256-V151936-n8192-K4-float32"
ACCURACY = [f"accuracy/{x}-{dtype}" for x in ("D768-V50257", "D512-V151936") for dtype in ("float32", "bfloat16")]
PAIRS, GROUPS = "step/K2-256:64-D256-V32000", "step/K4-256:64-D384-V4096"
TRL_STEP = "TRL DPOTrainer"  # step.TRL, whose module needs the training layer
Rows = dict[str, dict[str, Any]]


class Figures:
    """The results of all machines, by case and contender."""

    def __init__(self, reports: list[dict[str, Any]]) -> None:
        self.reports = reports

    @property
    def machines(self) -> str:
        n = len({report["machine"]["kind"] for report in self.reports})
        return "one machine" if n == 1 else f"the smallest of {n} machines"

    def of(self, case: str, *contenders: str, keep_memory: bool | None = None) -> list[Rows]:
        """Return the rows of a case, by contender, from every machine and allocator with figures of these, or exit."""
        found = []
        for report in self.reports:
            for result in report["results"]:
                if f"{result['suite']}/{result['case']}" == case and keep_memory in (None, result["keep_memory"]):
                    rows = {row["contender"]: row for row in result["rows"] if not row["reason"]}
                    found += [rows] if rows.keys() >= set(contenders) else []
        if not found:
            raise SystemExit(f"{RESULTS} has no figures of {', '.join(contenders)} in {case}: run `make bench`")
        return found

    def times(self, case: str, contender: str, of: str = OURS, keep_memory: bool | None = None) -> str:
        """Return how many times as long a contender takes, the smallest of all machines and allocators."""
        machines = self.of(case, contender, of, keep_memory=keep_memory)
        ratios = [table.times(rows[contender], rows[of]) for rows in machines]
        smallest = min(x for x in ratios if x is not None)
        return f"{smallest:.1f}" if smallest >= 1 else f"{smallest:.2f}"

    def over_bound(self, case: str, contender: str = OURS) -> str:
        """Return the time over that of the bound, the largest of all machines."""
        ratios = [table.times(rows[contender], rows[rows[contender]["bound"]]) for rows in self.of(case, contender)]
        return f"{max(x for x in ratios if x is not None):.2f}"

    def mib(self, case: str, contender: str = OURS) -> str:
        """Return the extra memory: the largest of ours, the smallest of others."""
        sizes = [rows[contender]["extra_bytes"] / MIB for rows in self.of(case, contender)]
        return f"{max(sizes) if contender.startswith(OURS) else min(sizes):,.0f}"

    def error(self, case: str, *contenders: str) -> str:
        """Return the largest error of a log-ratio in nats: the largest of ours, the smallest of others."""
        errors = [rows[name]["errors"]["max"] for rows in self.of(case, *contenders) for name in contenders]
        return f"{max(errors) if contenders == (OURS,) else min(errors):.2g}"

    def gradient_error(self, case: str, contender: str) -> str:
        """Return the largest relative error of the hidden states' gradient."""
        return f"{max(rows[contender]['errors']['hidden'] for rows in self.of(case, contender)):.1%}"

    def tables(self, *cases: str, keep_memory: bool = False) -> str:
        """Return a Markdown table of each case on each machine."""
        lines: list[str] = []
        for case in cases:
            for report in self.reports:
                for result in report["results"]:
                    if f"{result['suite']}/{result['case']}" != case or result["keep_memory"] != keep_memory:
                        continue
                    machine = f"{report['machine']['name']}, torch {report['machine']['versions']['torch']}"
                    title = f"{result['title'][0].upper()}{result['title'][1:]} ({machine}, {result['date'][:10]}):"
                    lines += ["", title, "", *table.markdown(result)]
        return "\n".join(lines[1:])


def bullets(*texts: str) -> str:
    """Return list items, wrapped as the pages are."""
    items = [" ".join(text.split()) for text in texts]
    return "\n".join(textwrap.fill(f"- {x}", 120, subsequent_indent="  ", break_on_hyphens=False) for x in items)


def why(f: Figures) -> str:
    """The README's list of reasons, as far as it has figures."""
    # the kernel with metrics does more and was yet faster in some runs, because fresh memory varies in cost
    trl = min((f.times(EXO, name) for name in (peers.TRL, peers.TRL_METRICS)), key=float)
    ours, others = f.error(ACCURACY[1], OURS), f.error(ACCURACY[1], EAGER, peers.TRL, peers.LIGER)
    return bullets(
        f"""**Exact.** The log-ratio of a 512-token sequence with bf16 operands is off by {ours} nats; eager PyTorch,
        TRL's fused head and Liger's DPO loss are off by {others} or more (D = 768, V = 50,257).""",
        f"""**Fast.** A loss from hidden states takes {f.over_bound(EXO)} times its bare matmuls. Eager PyTorch takes
        {f.times(EXO, EAGER)} times as long as ours, torch.compile {f.times(EXO, COMPILED)}, TRL's fused head {trl},
        Liger's DPO loss {f.times(DPO, peers.LIGER)} (2 CPU cores, fp32, {f.machines}; no GPU has been
        measured yet).""",
        f"""**Small.** The full logits never exist: {f.mib(EXO)} MiB beyond inputs and gradients where eager PyTorch
        needs {f.mib(EXO, EAGER)} MiB and TRL's fused head {f.mib(EXO, peers.TRL)} MiB, and you set the budget.""",
        f"""**K-way and ragged.** Any number of completions per prompt, a different number for each prompt, from
        preferences or from rewards. A prompt is encoded once for all its completions: a training step is
        {f.times(PAIRS, TRL_STEP)} times as fast as that of TRL 1.16's DPO trainer with a precomputed reference.""",
    )


def from_logits(f: Figures) -> str:
    return f"""{f.tables(LOGITS, LOGITS_LARGE)}

With an allocator that keeps freed memory in the process (glibc's gives blocks above 32 MiB back, so that every call
touches fresh pages):

{f.tables(LOGITS, LOGITS_LARGE, keep_memory=True)}"""


def from_hidden_states(f: Figures) -> str:
    return f"""{f.tables(EXO, DPO, LOGPS, EXO_BF16)}

8192 rows with loss and V = 151,936 in a budget of 256 MiB take {f.mib(LARGE)} MiB beyond inputs and gradients; their
fp32 logits would take 4,748 MiB."""


def accuracy(f: Figures) -> str:
    return f.tables(*ACCURACY)


def training_step(f: Figures) -> str:
    return f.tables(PAIRS, GROUPS)


def aims(f: Figures) -> str:
    """The speedups aimed for, in docs/limitations.md."""
    default, kept = (f.times(LOGITS, EAGER, keep_memory=keeps) for keeps in (False, True))
    return bullets(
        f"""From hidden states on two CPU cores we aimed for 3.3 times eager PyTorch, 2.5 times torch.compile and 2.8
        times Liger's DPO loss, and reached {f.times(EXO, EAGER)}, {f.times(EXO, COMPILED)} and
        {f.times(DPO, peers.LIGER)}. The bare matmuls alone are {f.times(EXO, EAGER, BOUND)},
        {f.times(EXO, COMPILED, BOUND)} and {f.times(DPO, peers.LIGER, BOUND)} times as fast as these methods, so no
        method reaches the aims on that machine. We take {f.over_bound(EXO)} times the matmuls; with a frozen head
        {f.over_bound(EXO, FROZEN)} times.""",
        f"""With bf16 operands, a CPU that multiplies bfloat16 itself is faster in plain PyTorch: eager on the rows with
        loss takes {f.times(EXO_BF16, EAGER_ROWS)} times as long as ours, which multiplies in fp32. Its gradients are
        off by {f.gradient_error(EXO_BF16, EAGER_ROWS)}, ours by {f.gradient_error(EXO_BF16, OURS)}.""",
        f"""From logits, most of the speed over eager PyTorch on a CPU is that of memory: eager touches fresh pages in
        every call, and takes {default} times as long as ours. With an allocator that keeps freed memory it takes {kept}
        times as long.""",
        f"""A training step is {f.times(PAIRS, TRL_STEP)} times as fast as TRL 1.16's DPO trainer; the aim is 7. Shared
        prompts are {f.times(GROUPS, PADDED)} times as fast as padded rows at K = 4 with 10M parameters mostly in the
        body.""",
    )


BLOCKS: dict[str, Callable[[Figures], str]] = {
    "why": why, "logits": from_logits, "hidden": from_hidden_states, "accuracy": accuracy, "step": training_step,
    "aims": aims,
}  # fmt: skip


def fill(text: str, figures: Figures) -> str:
    """Return a page with its marked places filled."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- figures: {match[1]} -->\n{BLOCKS[match[1]](figures)}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description="Write figures into the pages.")
    parser.add_argument("--check", action="store_true", help="only say which pages differ; the exit status is 1 then")
    arguments = parser.parse_args(argv)
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    stale = 0
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        filled = fill(text, Figures(reports))
        if filled != text:
            stale += 1
            print(f"{page} differs from benchmarks/results" if arguments.check else f"written: {page}")
            if not arguments.check:
                path.write_text(filled, encoding="utf-8")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
