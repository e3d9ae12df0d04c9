"""A run completes even if its output is closed, full, broken or ASCII, and stops if its terminal hangs up."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exo.cli import signals
from tests.tasks import write_rows

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"p{i}", "completions": ["ä", "b"], "rewards": [i, 1.0]} for i in range(4)]
STAGE = "-m exo.best_of_n --data rows-ü.jsonl --n 2 --overwrite_output_dir --output_dir"


def shell(command: str, workdir: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a line of bash with pipefail; PYTHON is replaced by this interpreter."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"} | environment
    line = "set -o pipefail; " + command.replace("PYTHON", sys.executable)
    return subprocess.run(
        ["bash", "-c", line], cwd=workdir, env=env, capture_output=True, timeout=120, encoding="utf-8", errors="replace"
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("streams")
    write_rows(directory / "rows-ü.jsonl", ROWS)
    return directory


STREAMS = {
    "closed": (">&-", ""),
    "all-closed": ("<&- >&- 2>&-", ""),
    "full": (">/dev/full", "warning: standard output: No space left on device; the run continues without it\n"),
    "both-full": (">/dev/full 2>&1", ""),
    "broken-pipe": ("| true", ""),
    "both-broken": ("2>&1 | true", ""),
}


PRINTS = """
import os
from exo.cli import console, streams
streams.prepare()
for i in range(3):
    console.log(f"über {i}")
progress = console.Progress("step", 2, every=1)
progress.advance()
progress.advance()
with open("out-NAME", "w") as file:  # must not get the descriptor of a closed stream
    file.write("data")
raise SystemExit(3)
"""


@pytest.mark.parametrize("name", STREAMS)
def test_unwritable_output_does_not_stop_a_run(name, tmp_path):
    """Check that the program completes with its exit code, not with 120, and prints no traceback."""
    redirected, expected = STREAMS[name]
    (tmp_path / "prints.py").write_text(PRINTS.replace("NAME", name), encoding="utf-8")
    done = shell(f"PYTHON prints.py {redirected}", tmp_path)
    assert (done.returncode, done.stderr) == (3, expected)
    assert (tmp_path / f"out-{name}").read_text() == "data"


def test_characters_outside_the_encoding_are_escaped(tmp_path):
    (tmp_path / "prints.py").write_text(PRINTS, encoding="utf-8")
    done = shell("PYTHON prints.py", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 3 and done.stdout.startswith("\\xfcber 0\n") and not done.stderr


@pytest.mark.parametrize(
    "redirected", [">/dev/full", *(pytest.param(r, marks=pytest.mark.slow) for r in ("2>&1 | true", ">&- 2>&-"))]
)
def test_a_stage_runs_without_output(redirected, workdir):
    """Check it in an ASCII locale, with file names that ASCII cannot encode."""
    done = shell(f"PYTHON {STAGE} aus-ü {redirected}", workdir, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert len((workdir / "aus-ü" / "samples.jsonl").read_text(encoding="utf-8").splitlines()) == 4


SLEEPER = """
import os, sys, time
sys.argv[0] = "-m"
from exo.cli.main import run_command
class Options: nproc = 1
def run(options):
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        open("unwound", "w").close()
sys.exit(run_command(run, Options()))
"""


@pytest.mark.parametrize(("ignored", "code"), [(False, 129), (True, 143)], ids=["terminal", "nohup"])
def test_a_hangup_stops_a_run_unless_nohup_ignores_it(ignored, code, tmp_path):
    begin = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignored else None
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], cwd=tmp_path, stdout=subprocess.PIPE, env=env, preexec_fn=begin
    )
    assert child.stdout and child.stdout.readline() == b"begun\n"
    child.send_signal(signal.SIGHUP)
    if ignored:
        time.sleep(0.5)
        assert child.poll() is None
        child.terminate()
    assert child.wait(timeout=30) == code
    assert (tmp_path / "unwound").exists()  # cleaned up, as on SIGTERM
    child.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_training_stops_at_the_next_step_on_a_signal(number, capfd):
    """Check that the first signal requests a stop, and that nohup makes a run ignore SIGHUP."""
    with signals.graceful_shutdown():
        os.kill(os.getpid(), number)
        assert signals.stop_requested() == number
        with pytest.raises(signals.Stopped) as stopped:
            signals.raise_if_stop_requested()
    assert stopped.value.signum == number
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.graceful_shutdown():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.stop_requested()
    finally:
        signal.signal(signal.SIGHUP, previous)
