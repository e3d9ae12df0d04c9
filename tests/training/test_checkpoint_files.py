"""A process killed at any file-system call of a save leaves an intact checkpoint.

The process is not killed here: from the n-th call on, every call raises an exception that nothing catches, which leaves
the same files as kill -9. `make soak` and test_crashes.py kill real processes.
"""

import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from exo.training import checkpoint_files

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.listdir", "os.scandir"}
FACTS = {"step": 1}


class Killed(BaseException):
    pass


class Crash:
    """Makes every file-system call fail from the `at`-th on, while it is active."""

    calls: int | None = None  # None: inactive
    at = 0

    def hook(self, event: str, arguments: object) -> None:
        if self.calls is not None and event in EVENTS:
            self.calls += 1
            if self.calls > self.at:
                raise Killed

    def __call__(self, at: int, work) -> bool:
        """Run `work`; return whether it was killed."""
        self.at, self.calls = at, 0
        try:
            work()
        except (Killed, checkpoint_files.CheckpointNotWritten):  # torch wraps any exception
            assert self.calls > at
        finally:
            killed, self.calls = self.calls > at, None
        return killed


CRASH = Crash()
sys.addaudithook(CRASH.hook)  # hooks cannot be removed: this one is inactive outside of CRASH(...)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(5, 3, generator=generator) for name in ("model.a", "model.b", "optimizer.a")}


def assert_holds(path, expected) -> None:
    read = {name: torch.zeros(5, 3) for name in expected}
    checkpoint_files.read(path / checkpoint_files.TENSORS, read)
    assert all(torch.equal(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize("previous", [0, 1, 2, 3])
def test_a_save_killed_at_every_file_system_call_leaves_an_intact_checkpoint(previous, accelerator, tmp_path):
    """Check, with up to three earlier checkpoints, that the newest intact one is the new or the previous one."""
    written = {step: tensors(step) for step in range(1, previous + 2)}
    new = previous + 1
    for n in range(10_000):
        directory = tmp_path / str(n)
        for step in range(1, new):
            checkpoint_files.write(directory / f"step-{step}", written[step], FACTS, accelerator)
        path = directory / f"step-{new}"
        directory.mkdir(exist_ok=True)
        killed = CRASH(n, lambda path=path: checkpoint_files.write(path, written[new], FACTS, accelerator))
        newest = checkpoint_files.newest(directory)
        if newest is None:
            assert killed and not previous
        else:
            step = checkpoint_files.step_of(newest)
            assert step == new or (killed and step == new - 1)
            assert_holds(newest, written[step])
        checkpoint_files.write(path, written[new], FACTS, accelerator)  # resume the same run
        assert checkpoint_files.newest(directory) == path and not checkpoint_files.find_damage(path)
        assert_holds(path, written[new])
        names = sorted(entry.name for entry in directory.iterdir())
        assert names == [f"step-{step}" for step in range(max(1, new - 1), new + 1)]
        if not killed:
            break
    assert n > 15, "a save makes more than 15 file-system calls"


def test_tensors_are_packed_into_files_up_to_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "FILE", 16)
    tensors = {f"weights.{i}": torch.full((2,), float(i)) for i in range(5)}  # 8 bytes each
    checkpoint_files.write(tmp_path / "step-1", tensors, FACTS, Accelerator(cpu=True), 2)
    sizes = [len(load_file(path)) for path in sorted(tmp_path.glob("step-1/**/*.safetensors"))]
    assert sizes == [2, 2, 1]
