"""`make soak`: kills, damages, full disks, poison and splits, in numbers; and a long run's memory. It takes hours.

Each part goes on where it stopped: docs/soak.json holds what has been counted, with date and commit, and is written
after every try. `python -m tests.soak --table` prints it. What is tried is what test_crashes.py and test_parallel.py
try once.
"""

import argparse
import datetime
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from itertools import islice, product
from pathlib import Path

from safetensors.torch import load_file

from exo.runs import record as run_record
from exo.runs.atomic import write_json
from exo.training import checkpoint_files
from tests import interruptions
from tests.fork_server import Server, moments
from tests.interruptions import STAGES, made
from tests.training.test_crashes import damage

RESULTS = Path(__file__).parents[1] / "docs" / "soak.json"
GOALS = {"kills": 1000, "damages": 500, "disks": 40, "poisons": 60, "splits": 12, "steps": 10_000}
SAID = {
    "kills": ("killed, at any moment and within saves", "went on to the same end, bit for bit"),
    "damages": ("damages of a state: a bit, an end", "seen, and the state not used"),
    "disks": ("sizes of a disk", "of which those too small said so, and went on once there was room"),
    "poisons": ("losses and gradients that are not finite", "stopped before the update, or skipped it as asked"),
    "splits": ("splits over two processes", "equal to one process to 1e-14 (fp64)"),
    "steps": ("steps in one run", "with memory and open files flat"),
}


class Soak:
    def __init__(self, directory: Path) -> None:
        self.directory, self.server = directory, Server()
        self.found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        interruptions.given(directory)
        self.log = directory / "log"
        self.whole, self.seconds = {}, {}
        for stage in STAGES:
            argv = interruptions.arguments(stage, directory, directory / f"whole-{stage}")
            for _ in range(2):  # the first comes with the imports
                began = time.monotonic()
                assert self.server.run(stage, [*argv, "--overwrite_output_dir"], self.log) == 0, self.log.read_text()
            self.seconds[stage] = time.monotonic() - began
            self.whole[stage] = made(directory / f"whole-{stage}")

    def run(self, part: str) -> None:
        done = self.found.setdefault(part, {"tried": 0, "right": 0, "wrong": [], "rounds": 0})
        while done["tried"] < GOALS[part]:
            tried, right, facts = getattr(self, part)(done["rounds"])
            done["rounds"] += 1
            done["tried"] += tried
            done["right"] += right
            for name, value in facts.items():
                both = (done.get(name, 0), value)
                done[name] = max(both) if isinstance(value, float) else sum(both)
            if right < tried:
                done["wrong"].append(done["tried"])
            commit = subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
            ).stdout.strip()
            done |= {"commit": commit, "date": datetime.date.today().isoformat()}
            write_json(RESULTS, self.found)
            print(f"{part}: {done['right']} of {done['tried']}", flush=True)

    def _new(self, stage: str, at: str = "run") -> list[str]:
        shutil.rmtree(self.directory / at, ignore_errors=True)
        return interruptions.arguments(stage, self.directory, self.directory / at)

    def _ends(self, stage: str, argv: list[str], at: str = "run") -> bool:
        return self.server.run(stage, argv, self.log) == 0 and made(self.directory / at) == self.whole[stage]

    def kills(self, done: int) -> tuple[int, int, dict]:
        """A run that is killed again and again, every other one within its saves."""
        stage, kills = list(STAGES)[done % len(STAGES)], 0
        argv, rng = self._new(stage), random.Random(done)
        for delay in islice(moments(done, 0.8 * self.seconds[stage]), 30):
            if rng.random() < 0.5:
                code = self.server.run(stage, argv, self.log, crash=rng.randrange(40))
            else:
                code = self.server.killed(stage, argv, self.log, after=delay)
            kills += code in (9, -9)
            if code == 0:
                break
        ends = self._ends(stage, argv)
        return kills, kills * ends, {}

    def damages(self, done: int) -> tuple[int, int, dict]:
        """One state, damaged 25 times over; and once for all the run goes on from the one before it."""
        argv, rng = self._new("sft"), random.Random(done)
        assert self.server.run("sft", argv, self.log, crash=80) == 9
        state = checkpoint_files.newest(self.directory / "run" / run_record.STATES)
        assert state is not None
        seen = 0
        for _ in range(25):
            file = rng.choice(sorted(file for file in state.rglob("*") if file.is_file()))
            content = file.read_bytes()
            damage(file, content, rng)
            seen += bool(checkpoint_files.find_damage(state))
            damaged, before = file.read_bytes(), content
            file.write_bytes(before)
        file.write_bytes(damaged)
        return 25, seen * self._ends("sft", argv), {}

    def disks(self, done: int) -> tuple[int, int, dict]:
        """A disk of its own for the run, too small for all of it; then there is room."""
        disk = self.directory / "disk"
        disk.mkdir(exist_ok=True)
        kib = 60 + 12 * done
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", disk], check=True)
        try:
            argv = interruptions.arguments("sft", self.directory, disk / "run")
            before = self.log.stat().st_size
            code = self.server.run("sft", argv, self.log)
            said = self.log.read_bytes()[before:].decode()
            if code == 0:
                return 1, made(disk / "run") == self.whole["sft"], {"runs_it_was_enough_for": 1}
            right = "No space left" in said and "Traceback" not in said
            last = checkpoint_files.newest(disk / "run" / run_record.STATES)
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            went_on = self.server.run("sft", argv, self.log) == 0 and made(disk / "run") == self.whole["sft"]
            return 1, right and went_on, {"last_state_kept": int(last is not None)}
        finally:
            subprocess.run(["umount", disk], check=True)

    def poisons(self, done: int) -> tuple[int, int, dict]:
        kind, how, step = list(product(("loss", "gradient"), ("stop", "skip"), range(1, 11)))[done * 7 % 40]
        argv = [*self._new("align"), "--on_nan", how]
        code = self.server.run("align", argv, self.log, poison=[kind, step])
        log = interruptions.lines(self.directory / "run" / "metrics.jsonl")
        steps = [line for line in log if "learning_rate" in line]
        if how == "stop":
            return 1, code == 1 and len(steps) == step - 1, {}
        finite = all(p.isfinite().all() for p in load_file(self.directory / "run" / "model.safetensors").values())
        return 1, code == 0 and finite and [line["step"] for line in steps if "skipped" in line] == [step], {}

    def splits(self, done: int) -> tuple[int, int, dict]:
        sizes, how, tokens = list(product(([5] * 6, [1, 60, 2, 3, 40, 1, 5], [9]), ("ddp", "fsdp"), (70, 4096)))[done]
        for name, processes, kind, most in (("one", 1, "ddp", 4096), ("two", 2, how, tokens)):
            arguments = [kind, str(self.directory / name), json.dumps(sizes), str(most)]
            assert self.server.run("tests.parallel_worker", arguments, self.log, ranks=processes) == 0
        one, two = (load_file(self.directory / name) for name in ("one", "two"))
        largest = max(float((one[name] - two[name]).abs().max()) for name in one if name != "losses")
        return 1, largest <= 1e-14, {"largest_difference": largest}

    def steps(self, done: int) -> tuple[int, int, dict]:
        """Memory and open files after a tenth of the run, and at the end of its training."""
        argv = [*self._new("sft"), f"--max_steps={GOALS['steps']}", "--save_steps=50"]
        pid = self.server.begin("sft", argv, self.log)
        log, seen = self.directory / "run" / "metrics.jsonl", []
        while (code := self.server.poll()) is None:
            time.sleep(0.5)
            try:
                step = log.read_bytes().count(b"\n")
                rss = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                seen.append((step, rss, len(os.listdir(f"/proc/{pid}/fd"))))
            except OSError:
                continue
        training = [x for x in seen if GOALS["steps"] / 10 <= x[0] < GOALS["steps"]]  # then it saves, and draws curves
        (first, early, files), (last, late, more) = training[0], training[-1]
        growth = (late - early) / (last - first)
        flat = growth < 1024 and more <= files + 1
        return GOALS["steps"], GOALS["steps"] * (code == 0 and flat), {"bytes_a_step": growth}


def table() -> None:
    found = json.loads(RESULTS.read_text())
    for part, (what, right) in SAID.items():
        if part in found:
            row = found[part]
            more = {k: v for k, v in row.items() if k not in ("tried", "right", "wrong", "rounds", "commit", "date")}
            print(f"{row['tried']:6,} {what}: {row['right']:,} {right}  {more or ''}  ({row['date']}, {row['commit']})")


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--parts", default=",".join(GOALS))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table:
        with tempfile.TemporaryDirectory() as directory:
            soak = Soak(Path(directory))
            for part in arguments.parts.split(","):
                soak.run(part)
    table()


if __name__ == "__main__":
    main()
