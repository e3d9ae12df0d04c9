"""Processes that are killed: at any moment, at every call of the file system within a save; and damaged states.

A sample of what soak.py does for hours. Whatever happened, the same command again ends where the run that nothing
happened to ended, bit for bit.
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
from tests.fork_server import Server, moments
from tests.interruptions import STAGES, made

MOST = 12  # tries of a run that is killed each time


@pytest.fixture(scope="module")
def server():
    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="module")
def given(tmp_path_factory, server):
    """Data and a start, and for a stage what it makes undisturbed, and in how many seconds."""
    directory = interruptions.given(tmp_path_factory.mktemp("given"))

    @cache
    def undisturbed(stage):
        run = directory / f"whole-{stage}"
        argv = interruptions.arguments(stage, directory, run)
        began = server.run(stage, argv, directory / "log"), time.monotonic()  # its first comes with the imports
        assert began[0] == 0, (directory / "log").read_text()
        whole = made(run)
        assert server.run(stage, [*argv, "--overwrite_output_dir"], directory / "log") == 0
        assert made(run) == whole
        return whole, time.monotonic() - began[1]

    return directory, undisturbed


def finished(server: Server, stage: str, argv: list[str], log: Path) -> None:
    assert server.run(stage, argv, log) == 0, log.read_text()[-2000:]


@pytest.mark.parametrize(
    ("stage", "seed"),
    [pytest.param(stage, seed, marks=() if (stage, seed) in (("align", 0), ("ppo", 0)) else pytest.mark.slow)
     for stage in STAGES for seed in range(8)],
)  # fmt: skip
def test_killed_at_any_moment_again_and_again(stage, seed, server, given, tmp_path):
    directory, undisturbed = given
    whole, seconds = undisturbed(stage)
    argv, log = interruptions.arguments(stage, directory, tmp_path / "run"), tmp_path / "log"
    kills = 0
    for delay in chain([0.6 * seconds], islice(moments(seed, seconds), MOST)):
        anew = ["--overwrite_output_dir"] * (kills == 0)  # a run that ended before its kill is none
        code = server.killed(stage, [*argv, *anew], log, after=delay)
        assert code in (0, -9), log.read_text()[-2000:]
        kills += code == -9
        if code == 0 and kills:
            break
    finished(server, stage, argv, log)
    assert kills and made(tmp_path / "run") == whole


def crashes(server: Server, stage: str, argv: list[str], log: Path, first: int, step: int):
    """Kill a new run at its n-th call of the file system in saves, for each n until there are no more."""
    n = first
    while server.run(stage, [*argv, "--overwrite_output_dir"], log, crash=n) == 9:
        yield n
        n += step


@pytest.mark.slow  # test_checkpoint_files fails every call, in one process
@pytest.mark.parametrize("step", [29, 1])
def test_killed_at_every_call_of_the_file_system_within_a_save(step, server, given, tmp_path):
    directory, undisturbed = given
    argv, log = interruptions.arguments("sft", directory, tmp_path / "run"), tmp_path / "log"
    tried = 0
    for n in crashes(server, "sft", argv, log, first=0, step=step):
        finished(server, "sft", argv, log)
        assert made(tmp_path / "run") == undisturbed("sft")[0], n
        tried += 1
    assert tried * step > 80, "4 saves of 5 files each"


def test_damaged_anywhere_a_state_is_not_used(server, given, tmp_path):
    directory, _ = given
    argv, log = interruptions.arguments("sft", directory, tmp_path / "run"), tmp_path / "log"
    assert server.run("sft", argv, log, crash=80) == 9
    state = checkpoint_files.newest(tmp_path / "run" / run_record.STATES)
    assert state is not None
    rng = random.Random(0)
    files = sorted(file for file in state.rglob("*") if file.is_file())
    for _ in range(200):
        file = rng.choice(files)
        content = file.read_bytes()
        damage(file, content, rng)
        assert checkpoint_files.find_damage(state), file
        file.write_bytes(content)
    assert not checkpoint_files.find_damage(state)


def damage(file: Path, content: bytes, rng: random.Random) -> None:
    """A bit flipped, an end cut off, or another end."""
    place = rng.randrange(len(content))
    kind = rng.randrange(3)
    if kind == 0:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
    else:
        file.write_bytes(content[:place] if kind == 1 else content + b"\0")


def test_two_at_once_in_one_directory_the_second_refuses(server, given, tmp_path):
    directory, undisturbed = given
    argv, log = interruptions.arguments("align", directory, tmp_path / "run"), tmp_path / "log"
    pid = server.begin("align", argv, log)
    while not (tmp_path / "run" / "run.json").exists() and server.poll() is None:
        time.sleep(0.01)
    assert STAGES["align"].main(argv) == 1
    assert server.end() == 0
    assert made(tmp_path / "run") == undisturbed("align")[0] and pid


def test_sampling_and_scoring_go_on_within_themselves(server, given, tmp_path, monkeypatch):
    """Pieces that were whole are not made again, and the file is the same."""
    from exo import sample
    from exo.rollouts import generate

    directory, _ = given
    argv = ["--model", str(directory / "start"), "--data", str(directory / "ppo.jsonl"), "--k", "2", "--device", "cpu"]
    argv += ["--max_new_tokens", "6", "--batch_size", "6"]
    assert sample.main([*argv, "--output_dir", str(tmp_path / "whole")]) == 0
    drawn = []
    draw = generate._draw

    def dies(*arguments):
        drawn.append(1)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "_draw", dies)
        assert sample.main([*argv, "--output_dir", str(tmp_path / "run")]) == 130
    pieces = tmp_path / "run" / "pieces.jsonl"
    pieces.write_bytes(pieces.read_bytes()[:-5])  # the last of three is cut
    with monkeypatch.context() as patch:
        patch.setattr(generate, "_draw", lambda *a: drawn.append(2) or draw(*a))
        assert sample.main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    assert drawn.count(2) == 8 - 2
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path / "run")) == ["run.json", "samples.jsonl"]
