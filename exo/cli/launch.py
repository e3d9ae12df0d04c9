"""Several processes on this machine: `--nproc N` of a stage begins N of itself, as torchrun would.

The first that fails ends the others. What several say alike on stderr is said once. A signal goes to all of them, and
the end of the launcher is one. Left out: several machines, which torchrun and accelerate's launcher begin.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from exo.cli import signals

PATIENCE = 15.0  # seconds between asking processes to end and ending them
TICK = 0.05
PARENT = "EXO_LAUNCHER"  # its process


def is_launcher(processes: int) -> bool:
    """Whether this process is to begin others; whoever is one of several already is not."""
    return processes > 1 and "RANK" not in os.environ


def exit_with_launcher() -> None:
    """One of several is told to stop where the one that began them is killed."""
    if PARENT in os.environ:
        signals.exit_with_parent(int(os.environ[PARENT]))


def run(module: str, arguments: Sequence[str], processes: int) -> int:
    """The exit code of the first that failed, or 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    common |= {"LOCAL_WORLD_SIZE": str(processes), PARENT: str(os.getpid())}
    # as many threads together as one process would have
    common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    children: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in signals.handled()}
    try:
        for rank in range(processes):
            command = [sys.executable, "-m", module, *arguments]
            own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # of their own group: a terminal's signal comes from here alone
            children.append(subprocess.Popen(command, env=own, process_group=0, stderr=subprocess.PIPE))
            if asked:
                return 128 + asked[0]  # those that have begun have done nothing
        said: dict[bytes, int] = {}
        tellers = [
            threading.Thread(target=_tell, args=(rank, child, said), daemon=True) for rank, child in enumerate(children)
        ]
        for teller in tellers:
            teller.start()
        code = _outcome(children)
        for teller in tellers:
            teller.join(1.0)
        return code
    finally:
        for child in children:
            child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(rank: int, child: "subprocess.Popen[bytes]", said: dict[bytes, int]) -> None:
    """What no other has said before."""
    assert child.stderr
    for line in child.stderr:
        if said.setdefault(line, rank) == rank:
            with contextlib.suppress(OSError):  # without a reader too: a full pipe would block the process
                sys.stderr.write(line.decode(errors="backslashreplace"))
                sys.stderr.flush()


def _outcome(children: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            break
        time.sleep(TICK)
    until = time.monotonic() + PATIENCE
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(TICK)  # those that wait for the one that is gone find out, or are ended
    code = next(iter(failed), 0)
    return 128 - code if code < 0 else code
