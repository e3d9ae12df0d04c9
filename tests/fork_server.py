"""A server that forks processes to run a stage, so that tests can kill them; a fork skips the slow imports.

`python -m tests.fork_server` reads one line of JSON per run, {"stage", "argv", "log", "ranks", "crash", "poison"}, and
prints its pid, then its exit code. "ranks": n starts n processes, as a launcher does. "crash": n ends the process, as
kill -9 does, at the n-th file-system call in the saves of checkpoints. "poison": [kind, step] makes the loss or the
gradient of that step of an alignment non-finite. `Server` is the client.
"""

import contextlib
import importlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.listdir", "os.scandir"}


class Server:
    """Starts the fork server and runs stages in it, one at a time."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, cwd=Path(__file__).parents[1],
        )  # fmt: skip

    def start(
        self, stage: str, argv: list[str], log: Path, *, ranks: int = 1, crash: int | None = None, poison: object = None
    ) -> int:
        """Start a run, append its output to `log`, and return its pid."""
        assert self.child.stdin and self.child.stdout
        request = {"stage": stage, "argv": argv, "log": str(log), "ranks": ranks, "crash": crash, "poison": poison}
        self.child.stdin.write(json.dumps(request) + "\n")
        self.child.stdin.flush()
        return int(self.child.stdout.readline())

    def wait(self) -> int:
        """Wait for the run; return its exit code, or minus the signal that killed it."""
        assert self.child.stdout
        return int(self.child.stdout.readline())

    def poll(self) -> int | None:
        """Return the exit code if the run has ended, else None."""
        assert self.child.stdout
        return self.wait() if select.select([self.child.stdout], [], [], 0)[0] else None

    def run(self, *run, **options) -> int:
        self.start(*run, **options)
        return self.wait()

    def run_and_kill(self, *run, after: float) -> int:
        """Run, kill the process after `after` seconds unless it has ended, and return its exit code."""
        pid = self.start(*run)
        time.sleep(after)
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            pass  # the run has ended
        return self.wait()

    def close(self) -> None:
        assert self.child.stdin
        self.child.stdin.close()
        self.child.wait()


def kill_delays(seed: int, longest: float):
    """Yield random delays, in seconds, after which to kill a run."""
    rng = random.Random(seed)
    while True:
        yield rng.uniform(0, longest)


def _poison(kind: str, at: int) -> None:
    """Make the loss or the gradient of step `at` non-finite."""
    from exo.training import preference
    from exo.training import step as training_step

    forward, accumulate, current_step = preference.PreferenceLoss.forward, training_step.accumulate, [0]

    def record_step(module, parts, count, accelerator, collate, step, *rest):
        current_step[0] = step
        return accumulate(module, parts, count, accelerator, collate, step, *rest)

    def poisoned_forward(self, batch, count):
        share = forward(self, batch, count)
        if count is None or current_step[0] != at:
            return share
        bad = share.loss * float("nan") if kind == "loss" else (next(self.parameters()).sum() * 0).abs().sqrt()
        return share._replace(loss=share.loss + bad)

    preference.PreferenceLoss.forward, training_step.accumulate = poisoned_forward, record_step


def _crash_in_saves(at: int) -> None:
    """End the process at the `at`-th file-system call in the saves of checkpoints."""
    from exo.training import checkpoint_files

    calls, saving = 0, False

    def count(event: str = "", arguments: object = None, handle: int | None = None) -> None:
        nonlocal calls, saving
        if saving and (event in EVENTS or not event):
            if calls == at:
                saving = False
                with contextlib.suppress(OSError):  # leave a half-written file; fails for a directory
                    os.ftruncate(handle or -1, os.fstat(handle or -1).st_size // 2)
                os._exit(9)
            calls += 1

    write, fsync = checkpoint_files.write, os.fsync

    def watched_write(*arguments) -> None:
        nonlocal saving
        saving = True
        write(*arguments)
        saving = False

    def counted_fsync(handle: int) -> None:
        count(handle=handle)
        fsync(handle)

    checkpoint_files.write, os.fsync = watched_write, counted_fsync
    sys.addaudithook(count)


def _run(request: dict) -> int:
    """Run a stage, or a module of the tests, in this process; return its exit code."""
    from tests.interruptions import STAGES

    if request["crash"] is not None:
        _crash_in_saves(request["crash"])
    if request["poison"] is not None:
        _poison(*request["poison"])
    try:
        module = STAGES.get(request["stage"]) or importlib.import_module(request["stage"])
        code = module.main(request["argv"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    return code if isinstance(code, int) else 98


def _run_ranks(request: dict) -> int:
    """Run on several ranks, as a launcher does; return the exit code of the first rank that failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in map(str, range(request["ranks"])):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(request["ranks"])}
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(request["ranks"])}
            os._exit(_run(request))
        ranks.append(pid)
    code = 0
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        exit_code = os.waitstatus_to_exitcode(status)
        if exit_code and not code:
            code = 128 - exit_code if exit_code < 0 else exit_code
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return code


def main() -> None:
    import torch

    import tests.parallel_worker  # noqa: F401  imports everything that runs need

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os._exit(_run(request) if request["ranks"] == 1 else _run_ranks(request))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
