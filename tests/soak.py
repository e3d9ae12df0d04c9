"""`make soak`: hundreds of kills, damaged files, full disks, NaNs and split runs, and the memory of a long run.

It takes hours. docs/soak.json holds the counts with date and commit; it is written after every try, and each part
resumes from it. `python -m tests.soak --table` prints it. test_crashes.py and test_parallel.py try each case once.
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
from tests.fork_server import Server, kill_delays
from tests.interruptions import STAGES, fingerprint
from tests.training.test_crashes import damage

RESULTS = Path(__file__).parents[1] / "docs" / "soak.json"
GOALS = {"kills": 1000, "damages": 500, "disks": 40, "poisons": 60, "splits": 12, "steps": 10_000}
ROWS = {
    "kills": ("runs killed, at random moments and within saves", "resumed to the same bits"),
    "damages": (
        "damaged checkpoints: a flipped bit, a truncated or extended file",
        "detected, and the checkpoint not used",
    ),
    "disks": ("disk sizes", "handled: too small a disk is an error, and the run resumes once there is room"),
    "poisons": ("non-finite losses and gradients", "stopped before the update, or skipped it with --on_nan skip"),
    "splits": ("runs split over two processes", "equal to one process to 1e-14 (fp64)"),
    "steps": ("steps in one run", "with memory and open files flat"),
}


class Soak:
    def __init__(self, directory: Path) -> None:
        self.directory, self.server = directory, Server()
        self.results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        interruptions.write_inputs(directory)
        self.log = directory / "log"
        self.undisturbed, self.seconds = {}, {}
        for stage in STAGES:
            argv = interruptions.arguments(stage, directory, directory / f"undisturbed-{stage}")
            for _ in range(2):  # the first one includes the imports
                start = time.monotonic()
                assert self.server.run(stage, [*argv, "--overwrite_output_dir"], self.log) == 0, self.log.read_text()
            self.seconds[stage] = time.monotonic() - start
            self.undisturbed[stage] = fingerprint(directory / f"undisturbed-{stage}")

    def run(self, part: str) -> None:
        counts = self.results.setdefault(part, {"tried": 0, "right": 0, "wrong": [], "rounds": 0})
        while counts["tried"] < GOALS[part]:
            tried, right, measurements = getattr(self, part)(counts["rounds"])
            counts["rounds"] += 1
            counts["tried"] += tried
            counts["right"] += right
            for name, value in measurements.items():
                values = (counts.get(name, 0), value)
                counts[name] = max(values) if isinstance(value, float) else sum(values)
            if right < tried:
                counts["wrong"].append(counts["tried"])
            commit = subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
            ).stdout.strip()
            counts |= {"commit": commit, "date": datetime.date.today().isoformat()}
            write_json(RESULTS, self.results)
            print(f"{part}: {counts['right']} of {counts['tried']}", flush=True)

    def _new_run(self, stage: str, name: str = "run") -> list[str]:
        shutil.rmtree(self.directory / name, ignore_errors=True)
        return interruptions.arguments(stage, self.directory, self.directory / name)

    def _finishes(self, stage: str, argv: list[str], name: str = "run") -> bool:
        return (
            self.server.run(stage, argv, self.log) == 0
            and fingerprint(self.directory / name) == self.undisturbed[stage]
        )

    def kills(self, round_number: int) -> tuple[int, int, dict]:
        """Kill a run repeatedly, half of the times within a save."""
        stage, kills = list(STAGES)[round_number % len(STAGES)], 0
        argv, rng = self._new_run(stage), random.Random(round_number)
        for delay in islice(kill_delays(round_number, 0.8 * self.seconds[stage]), 30):
            if rng.random() < 0.5:
                code = self.server.run(stage, argv, self.log, crash=rng.randrange(40))
            else:
                code = self.server.run_and_kill(stage, argv, self.log, after=delay)
            kills += code in (9, -9)
            if code == 0:
                break
        resumed = self._finishes(stage, argv)
        return kills, kills * resumed, {}

    def damages(self, round_number: int) -> tuple[int, int, dict]:
        """Damage a checkpoint in 25 ways; from the last one the run must resume with the previous checkpoint."""
        argv, rng = self._new_run("sft"), random.Random(round_number)
        assert self.server.run("sft", argv, self.log, crash=80) == 9
        checkpoint = checkpoint_files.newest(self.directory / "run" / run_record.STATES)
        assert checkpoint is not None
        detected = 0
        for _ in range(25):
            file = rng.choice(sorted(file for file in checkpoint.rglob("*") if file.is_file()))
            content = file.read_bytes()
            damage(file, content, rng)
            detected += bool(checkpoint_files.find_damage(checkpoint))
            damaged, original = file.read_bytes(), content
            file.write_bytes(original)
        file.write_bytes(damaged)
        return 25, detected * self._finishes("sft", argv), {}

    def disks(self, round_number: int) -> tuple[int, int, dict]:
        """Run on a disk that may be too small, then enlarge the disk and resume."""
        disk = self.directory / "disk"
        disk.mkdir(exist_ok=True)
        kib = 60 + 12 * round_number
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", disk], check=True)
        try:
            argv = interruptions.arguments("sft", self.directory, disk / "run")
            log_size = self.log.stat().st_size
            code = self.server.run("sft", argv, self.log)
            output = self.log.read_bytes()[log_size:].decode()
            if code == 0:
                return 1, fingerprint(disk / "run") == self.undisturbed["sft"], {"runs_it_was_enough_for": 1}
            reported = "No space left" in output and "Traceback" not in output
            checkpoint = checkpoint_files.newest(disk / "run" / run_record.STATES)
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            resumed = (
                self.server.run("sft", argv, self.log) == 0 and fingerprint(disk / "run") == self.undisturbed["sft"]
            )
            return 1, reported and resumed, {"last_state_kept": int(checkpoint is not None)}
        finally:
            subprocess.run(["umount", disk], check=True)

    def poisons(self, round_number: int) -> tuple[int, int, dict]:
        kind, on_nan, step = list(product(("loss", "gradient"), ("stop", "skip"), range(1, 11)))[round_number * 7 % 40]
        argv = [*self._new_run("align"), "--on_nan", on_nan]
        code = self.server.run("align", argv, self.log, poison=[kind, step])
        log = interruptions.lines(self.directory / "run" / "metrics.jsonl")
        steps = [line for line in log if "learning_rate" in line]
        if on_nan == "stop":
            return 1, code == 1 and len(steps) == step - 1, {}
        finite = all(p.isfinite().all() for p in load_file(self.directory / "run" / "model.safetensors").values())
        return 1, code == 0 and finite and [line["step"] for line in steps if "skipped" in line] == [step], {}

    def splits(self, round_number: int) -> tuple[int, int, dict]:
        sizes, strategy, tokens = list(product(([5] * 6, [1, 60, 2, 3, 40, 1, 5], [9]), ("ddp", "fsdp"), (70, 4096)))[
            round_number
        ]
        for name, processes, kind, max_tokens in (("one", 1, "ddp", 4096), ("two", 2, strategy, tokens)):
            arguments = [kind, str(self.directory / name), json.dumps(sizes), str(max_tokens)]
            assert self.server.run("tests.parallel_worker", arguments, self.log, ranks=processes) == 0
        one, two = (load_file(self.directory / name) for name in ("one", "two"))
        largest = max(float((one[name] - two[name]).abs().max()) for name in one if name != "losses")
        return 1, largest <= 1e-14, {"largest_difference": largest}

    def steps(self, round_number: int) -> tuple[int, int, dict]:
        """Compare memory and open files after a tenth of a run with those at the end of its training."""
        argv = [*self._new_run("sft"), f"--max_steps={GOALS['steps']}", "--save_steps=50"]
        pid = self.server.start("sft", argv, self.log)
        log, samples = self.directory / "run" / "metrics.jsonl", []
        while (code := self.server.poll()) is None:
            time.sleep(0.5)
            try:
                step = log.read_bytes().count(b"\n")
                rss = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                samples.append((step, rss, len(os.listdir(f"/proc/{pid}/fd"))))
            except OSError:
                continue
        # after the last step the run saves the model and draws plots
        training = [x for x in samples if GOALS["steps"] / 10 <= x[0] < GOALS["steps"]]
        (first_step, rss_early, files_early), (last_step, rss_late, files_late) = training[0], training[-1]
        growth = (rss_late - rss_early) / (last_step - first_step)
        flat = growth < 1024 and files_late <= files_early + 1
        return GOALS["steps"], GOALS["steps"] * (code == 0 and flat), {"bytes_a_step": growth}


def table() -> None:
    results = json.loads(RESULTS.read_text())
    for part, (tries, result) in ROWS.items():
        if part in results:
            row = results[part]
            extra = {k: v for k, v in row.items() if k not in ("tried", "right", "wrong", "rounds", "commit", "date")}
            print(
                f"{row['tried']:6,} {tries}: {row['right']:,} {result}  {extra or ''}  ({row['date']}, {row['commit']})"
            )


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
