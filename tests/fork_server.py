"""Processes that run a stage and may be killed, each born in a moment from one that has imported everything.

`python -m tests.fork_server` reads a line of JSON a run, {"stage", "argv", "log", "ranks", "crash", "poison"}, prints
its pid and how it ended. With "ranks": n it is n processes together, as a launcher would begin them. With "crash": n
the process dies, as of kill -9, at the n-th call of the file system within the saves of states; with "poison": [kind,
step] the loss or gradient of that step of an alignment is not finite. `Server` is the other end. Left out: what is
killed and why (test_crashes.py, soak.py).
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
    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, cwd=Path(__file__).parents[1],
        )  # fmt: skip

    def begin(
        self, stage: str, argv: list[str], log: Path, *, ranks: int = 1, crash: int | None = None, poison: object = None
    ) -> int:
        """The pid of a run; its output goes to the end of `log`."""
        assert self.child.stdin and self.child.stdout
        asked = {"stage": stage, "argv": argv, "log": str(log), "ranks": ranks, "crash": crash, "poison": poison}
        self.child.stdin.write(json.dumps(asked) + "\n")
        self.child.stdin.flush()
        return int(self.child.stdout.readline())

    def end(self) -> int:
        """Its exit code; negative, the signal that killed it."""
        assert self.child.stdout
        return int(self.child.stdout.readline())

    def poll(self) -> int | None:
        """The same, if it has ended."""
        assert self.child.stdout
        return self.end() if select.select([self.child.stdout], [], [], 0)[0] else None

    def run(self, *run, **how) -> int:
        self.begin(*run, **how)
        return self.end()

    def killed(self, *run, after: float) -> int:
        """Killed after so many seconds, or ended before."""
        pid = self.begin(*run)
        time.sleep(after)
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            pass  # it had ended
        return self.end()

    def close(self) -> None:
        assert self.child.stdin
        self.child.stdin.close()
        self.child.wait()


def moments(seed: int, longest: float):
    """Random delays of a kill."""
    rng = random.Random(seed)
    while True:
        yield rng.uniform(0, longest)


def _poison(kind: str, at: int) -> None:
    from exo.training import preference
    from exo.training import step as training_step

    forward, accumulate, now = preference.PreferenceLoss.forward, training_step.accumulate, [0]

    def counted(module, parts, count, accelerator, collate, step, *rest):
        now[0] = step
        return accumulate(module, parts, count, accelerator, collate, step, *rest)

    def poisoned(self, batch, count):
        share = forward(self, batch, count)
        if count is None or now[0] != at:
            return share
        bad = share.loss * float("nan") if kind == "loss" else (next(self.parameters()).sum() * 0).abs().sqrt()
        return share._replace(loss=share.loss + bad)

    preference.PreferenceLoss.forward, training_step.accumulate = poisoned, counted


def _crash_in_saves(at: int) -> None:
    from exo.training import checkpoint_files

    seen, saving = 0, False

    def count(event: str = "", arguments: object = None, handle: int | None = None) -> None:
        nonlocal seen, saving
        if saving and (event in EVENTS or not event):
            if seen == at:
                saving = False
                with contextlib.suppress(OSError):  # a file that was being written is left in part; a directory is not
                    os.ftruncate(handle or -1, os.fstat(handle or -1).st_size // 2)
                os._exit(9)
            seen += 1

    write, fsync = checkpoint_files.write, os.fsync

    def watched(*arguments) -> None:
        nonlocal saving
        saving = True
        write(*arguments)
        saving = False

    def counted(handle: int) -> None:
        count(handle=handle)
        fsync(handle)

    checkpoint_files.write, os.fsync = watched, counted
    sys.addaudithook(count)


def _run(asked: dict) -> int:
    """A stage, or a module below tests, in this process."""
    from tests.interruptions import STAGES

    if asked["crash"] is not None:
        _crash_in_saves(asked["crash"])
    if asked["poison"] is not None:
        _poison(*asked["poison"])
    try:
        module = STAGES.get(asked["stage"]) or importlib.import_module(asked["stage"])
        code = module.main(asked["argv"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    return code if isinstance(code, int) else 98


def _run_ranks(asked: dict) -> int:
    """The same in several processes, as a launcher begins them; the exit code of the first that failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in map(str, range(asked["ranks"])):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(asked["ranks"])}
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(asked["ranks"])}
            os._exit(_run(asked))
        ranks.append(pid)
    code = 0
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        ended = os.waitstatus_to_exitcode(status)
        if ended and not code:
            code = 128 - ended if ended < 0 else ended
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return code


def main() -> None:
    import torch

    import tests.parallel_worker  # noqa: F401  imports all that is ever run here

    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os._exit(_run(asked) if asked["ranks"] == 1 else _run_ranks(asked))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
