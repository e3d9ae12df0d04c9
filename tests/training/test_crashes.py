"""Runs that are killed at random moments or within a save, and damaged checkpoints.

After each of them, the same command resumes and ends with the bits of an undisturbed run. soak.py repeats these tests
for hours.
"""

import os
import random
import time
from functools import cache
from itertools import chain, islice
from pathlib import Path

import pytest

from exo.runs import record as run_record
from exo.training import checkpoint_files
from tests import interruptions
from tests.fork_server import Server, kill_delays
from tests.interruptions import STAGES, fingerprint

MAX_KILLS = 12  # of one run


@pytest.fixture(scope="module")
def server():
    fork_server = Server()
    yield fork_server
    fork_server.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, server):
    """Return (directory, function): the inputs, and a function that runs a stage undisturbed.

    The function returns the fingerprint of the run and its duration in seconds.
    """
    directory = interruptions.write_inputs(tmp_path_factory.mktemp("inputs"))

    @cache
    def undisturbed(stage):
        run = directory / f"undisturbed-{stage}"
        argv = interruptions.arguments(stage, directory, run)
        first = server.run(stage, argv, directory / "log"), time.monotonic()  # the first run includes the imports
        assert first[0] == 0, (directory / "log").read_text()
        result = fingerprint(run)
        assert server.run(stage, [*argv, "--overwrite_output_dir"], directory / "log") == 0
        assert fingerprint(run) == result
        return result, time.monotonic() - first[1]

    return directory, undisturbed


def resume(server: Server, stage: str, argv: list[str], log: Path) -> None:
    assert server.run(stage, argv, log) == 0, log.read_text()[-2000:]


@pytest.mark.parametrize(
    ("stage", "seed"),
    [pytest.param(stage, seed, marks=() if (stage, seed) in (("align", 0), ("ppo", 0)) else pytest.mark.slow)
     for stage in STAGES for seed in range(8)],
)  # fmt: skip
def test_a_run_killed_at_random_moments_resumes_to_the_same_bits(stage, seed, server, inputs, tmp_path):
    directory, undisturbed = inputs
    expected, seconds = undisturbed(stage)
    argv, log = interruptions.arguments(stage, directory, tmp_path / "run"), tmp_path / "log"
    kills = 0
    for delay in chain([0.6 * seconds], islice(kill_delays(seed, seconds), MAX_KILLS)):
        overwrite = ["--overwrite_output_dir"] * (kills == 0)  # start over if the run ended before it was killed
        code = server.run_and_kill(stage, [*argv, *overwrite], log, after=delay)
        assert code in (0, -9), log.read_text()[-2000:]
        kills += code == -9
        if code == 0 and kills:
            break
    resume(server, stage, argv, log)
    assert kills and fingerprint(tmp_path / "run") == expected


def crashes(server: Server, stage: str, argv: list[str], log: Path, first: int, step: int):
    """Kill a new run at its n-th file-system call in saves; yield every n up to the last call."""
    n = first
    while server.run(stage, [*argv, "--overwrite_output_dir"], log, crash=n) == 9:
        yield n
        n += step


@pytest.mark.slow  # test_checkpoint_files.py covers every call, in one process
@pytest.mark.parametrize("step", [29, 1])
def test_a_run_killed_at_every_file_system_call_of_a_save_resumes(step, server, inputs, tmp_path):
    directory, undisturbed = inputs
    argv, log = interruptions.arguments("sft", directory, tmp_path / "run"), tmp_path / "log"
    tried = 0
    for n in crashes(server, "sft", argv, log, first=0, step=step):
        resume(server, "sft", argv, log)
        assert fingerprint(tmp_path / "run") == undisturbed("sft")[0], n
        tried += 1
    assert tried * step > 80, "4 saves of 5 files each"


def test_a_checkpoint_damaged_anywhere_is_detected(server, inputs, tmp_path):
    directory, _ = inputs
    argv, log = interruptions.arguments("sft", directory, tmp_path / "run"), tmp_path / "log"
    assert server.run("sft", argv, log, crash=80) == 9
    checkpoint = checkpoint_files.newest(tmp_path / "run" / run_record.STATES)
    assert checkpoint is not None
    rng = random.Random(0)
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    for _ in range(200):
        file = rng.choice(files)
        content = file.read_bytes()
        damage(file, content, rng)
        assert checkpoint_files.find_damage(checkpoint), file
        file.write_bytes(content)
    assert not checkpoint_files.find_damage(checkpoint)


def damage(file: Path, content: bytes, rng: random.Random) -> None:
    """Flip a bit of the file, truncate it, or append a byte."""
    place = rng.randrange(len(content))
    kind = rng.randrange(3)
    if kind == 0:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
    else:
        file.write_bytes(content[:place] if kind == 1 else content + b"\0")


def test_a_second_run_in_the_same_directory_is_refused(server, inputs, tmp_path):
    directory, undisturbed = inputs
    argv, log = interruptions.arguments("align", directory, tmp_path / "run"), tmp_path / "log"
    pid = server.start("align", argv, log)
    while not (tmp_path / "run" / "run.json").exists() and server.poll() is None:
        time.sleep(0.01)
    assert STAGES["align"].main(argv) == 1
    assert server.wait() == 0
    assert fingerprint(tmp_path / "run") == undisturbed("align")[0] and pid


def test_interrupted_sampling_resumes_after_the_last_complete_piece(server, inputs, tmp_path, monkeypatch):
    """Check that complete pieces are not sampled again and the final file is the same."""
    from exo import sample
    from exo.rollouts import generate

    directory, _ = inputs
    argv = ["--model", str(directory / "start"), "--data", str(directory / "ppo.jsonl"), "--k", "2", "--device", "cpu"]
    argv += ["--max_new_tokens", "6", "--batch_size", "6"]
    assert sample.main([*argv, "--output_dir", str(tmp_path / "undisturbed")]) == 0
    drawn = []
    draw = generate._draw

    def interrupt(*arguments):
        drawn.append(1)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "_draw", interrupt)
        assert sample.main([*argv, "--output_dir", str(tmp_path / "run")]) == 130
    pieces = tmp_path / "run" / "pieces.jsonl"
    pieces.write_bytes(pieces.read_bytes()[:-5])  # truncates the last of three pieces
    with monkeypatch.context() as patch:
        patch.setattr(generate, "_draw", lambda *a: drawn.append(2) or draw(*a))
        assert sample.main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    assert drawn.count(2) == 8 - 2
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (
        tmp_path / "undisturbed" / "samples.jsonl"
    ).read_bytes()
    assert sorted(os.listdir(tmp_path / "run")) == ["run.json", "samples.jsonl"]
