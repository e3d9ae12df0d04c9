"""The state of a training run on the disk, so that a run that was killed goes on as if it had not been.

A state is a directory below resume/ of the run: what is trained, the optimizer, all random states, and in JSON the
position in the data and in the log. It is written beside its place, flushed and renamed, with every file's sha256;
the newest one that is whole is gone on from, and the one before it is kept until then. Nothing in it is a pickle.
Of a model in shards each process writes what it holds. Left out: models to be used (models.save_checkpoint).
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exo import artifacts, console, sharding
from exo.artifacts import Metrics, RunError

KEPT = 2
VERSION = 1
MANIFEST = "manifest.json"
Tensors = dict[str, Tensor]


class Stateful(Protocol):
    """A part of a run that goes on from what it says of itself, in JSON."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Random(NamedTuple):
    torch: Tensor
    cuda: Tensor | None
    numpy: Any
    python: Any


class Position(NamedTuple):
    """Where a run stood after a step. Until the next update weights and optimizer belong to it too."""

    step: int
    metrics: int  # bytes of the log
    random: Random  # of this process
    counters: dict[str, float]
    parts: dict[str, dict[str, Any]]


class Keeper:
    """Saves the state of one run, and brings it back."""

    def __init__(
        self,
        run: Path,
        module: nn.Module,
        optim: Any,
        accelerator: Accelerator,
        metrics: Metrics,
        parts: Mapping[str, Stateful],
        *,
        allow_changes: bool,
    ) -> None:
        self.directory = run / artifacts.STATES
        self.module, self.accelerator = accelerator.unwrap_model(module), accelerator
        self.optim: torch.optim.Optimizer = getattr(optim, "optimizer", optim)
        self.metrics, self.parts, self.allow_changes = metrics, parts, allow_changes
        self.sharded = sharding.is_sharded(module)
        self.position: Position | None = None
        self.saved = 0  # the last step whose state is on the disk

    def restore(self) -> Position | None:
        """Bring back the newest whole state; None where there is none, and the log is emptied then."""
        path = newest(self.directory)
        if path is None:
            self._cut(0)
            return None
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
        world = self.accelerator.num_processes
        if facts["processes"] != world and not self.allow_changes:
            raise RunError(
                f"{path}: of {facts['processes']} processes, and there are {world} now; with --allow_changes it goes "
                "on, to the rounding of another order of sums"
            )
        if facts["sharded"] != self.sharded or (self.sharded and facts["processes"] != world):
            kind = "shards" if facts["sharded"] else "whole weights"
            raise RunError(f"{path}: {kind} of {facts['processes']} processes, which cannot be made into others here")
        own = self.accelerator.device
        device = "cpu" if own.type == "cpu" else str(own)
        self._put_weights(load_file(path / self._file("weights"), device), path)
        self._put_moments(load_file(path / self._file("optimizer"), device))
        if self.accelerator.scaler is not None and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        for name, part in self.parts.items():
            part.restore(facts["parts"][name])
        states = load_file(path / "random.safetensors")
        prefix = f"{self.accelerator.process_index}."
        mine = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
        if mine:
            _set_random(mine, self.accelerator.device)
        if self.accelerator.is_main_process and self.metrics.size() < facts["metrics"]:
            raise RunError(
                f"{path}: expected {facts['metrics']:,} bytes of {self.metrics.path}; it has fewer, and so is "
                "not this state's; --overwrite_output_dir begins anew"
            )
        self._cut(facts["metrics"])
        console.say(f"going on after step {facts['step']:,}, from {path}")
        self.saved = facts["step"]
        return self.mark(facts["step"], facts["counters"])

    def _cut(self, size: int) -> None:
        if self.accelerator.is_main_process:
            self.metrics.cut(size)

    def mark(self, step: int, counters: Mapping[str, float]) -> Position:
        """This is where the run stands, after an update; cheap, because it is said after each."""
        parts = {name: part.state() for name, part in self.parts.items()}
        drawn = _random(self.accelerator.device)
        self.position = Position(step, self.metrics.size(), drawn, dict(counters), parts)
        return self.position

    def save(self) -> Path | None:
        """Write the state of the position last marked. Called by all processes; None before the first."""
        position = self.position
        if position is None:
            return None
        path = self.directory / f"step-{position.step:08d}"
        if position.step == self.saved:
            return path
        drawn = {name: self.accelerator.gather(state[None].to(self.accelerator.device)).cpu()
                 for name, state in _as_tensors(position.random).items()}  # fmt: skip
        self.metrics.flush()  # no state says more than the log holds, whatever is cut off
        files = {}
        if self.sharded or self.accelerator.is_main_process:
            files = {self._file("weights"): self._weights(), self._file("optimizer"): self._moments()}
        if self.accelerator.is_main_process:
            files["random.safetensors"] = {
                f"{i}.{name}": state for name, rows in drawn.items() for i, state in enumerate(rows.clone())
            }
        scaler = self.accelerator.scaler
        facts = position._asdict() | {"processes": self.accelerator.num_processes, "random": None}
        facts |= {"sharded": self.sharded, "scaler": None if scaler is None else scaler.state_dict()}
        try:
            write(path, files, facts, self.accelerator)
        except (OSError, SafetensorError) as error:
            raise self._not_saved(position.step, error) from error
        self.accelerator.wait_for_everyone()
        self.saved = position.step
        return path

    def _file(self, what: str) -> str:
        return f"{what}.{self.accelerator.process_index}.safetensors" if self.sharded else f"{what}.safetensors"

    def kept(self) -> str:
        """What a run that ends early goes on from, for its last words; "" for nothing."""
        last = newest(self.directory)
        return f"; the last whole state is {last}, from which the same command goes on" if last else ""

    def _not_saved(self, step: int, error: Exception) -> RunError:
        what = getattr(error, "strerror", None) or str(error).splitlines()[0]
        return RunError(f"step {step}: its state could not be written to {self.directory}: {what}")

    def _lasting(self) -> Tensors:
        """What is trained, and buffers that a model keeps; of shards this process's own."""
        lasting = self.module.state_dict().keys()
        found = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        found |= {name: b for name, b in self.module.named_buffers() if name in lasting}
        return {name: sharding.own(tensor.detach()) for name, tensor in found.items()}

    def _weights(self) -> Tensors:
        return {name: _plain(tensor) for name, tensor in self._lasting().items()}

    def _put_weights(self, saved: Tensors, path: Path) -> None:
        own = self._lasting()
        expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
        found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        if expected != found:
            odd = min(name for name in {*expected, *found} if expected.get(name) != found.get(name))
            raise RunError(
                f"{path}: of another model: {odd} is {found.get(odd, 'not there')}, expected "
                f"{expected.get(odd, 'none')}; --overwrite_output_dir begins anew"
            )
        for name, tensor in saved.items():
            own[name].copy_(tensor)

    def _moments(self) -> Tensors:
        return {
            f"{name}.{kind}": _plain(tensor)
            for name, parameter in self.module.named_parameters()
            for kind, tensor in self.optim.state.get(parameter, {}).items()
        }

    def _put_moments(self, saved: Tensors) -> None:
        own = dict(self.module.named_parameters())
        for key, value in saved.items():
            name, _, kind = key.rpartition(".")
            self.optim.state[own[name]][kind] = sharding.like(value, own[name])


def _plain(tensor: Tensor) -> Tensor:
    return sharding.own(tensor.detach()).cpu().contiguous()


def _random(device: torch.device) -> Random:
    """Of torch, on the CPU and this process's GPU, of numpy and of Python, as each of them gives it."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return Random(torch.get_rng_state(), cuda, numpy.random.get_state(), random.getstate())


def _as_tensors(state: Random) -> Tensors:
    """Whole numbers below 2^53 are exact in doubles."""
    _, keys, *rest = state.numpy
    version, numbers, gauss = state.python
    python = [version, *numbers, float("nan") if gauss is None else gauss]
    found = {
        "torch": state.torch,
        "numpy": torch.tensor([*map(int, keys), *rest], dtype=torch.float64),
        "python": torch.tensor(python, dtype=torch.float64),
    }
    return found if state.cuda is None else found | {"cuda": state.cuda}


def _set_random(states: Tensors, device: torch.device) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
    *keys, place, has_gauss, gauss = states["numpy"].tolist()
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), int(place), int(has_gauss), gauss))
    version, *numbers, gauss = states["python"].tolist()
    random.setstate((int(version), tuple(map(int, numbers)), None if gauss != gauss else gauss))


def write(path: Path, files: Mapping[str, Tensors], facts: Mapping[str, Any], accelerator: Accelerator) -> None:
    """A state, of all processes' files: whole or not there. Those before the last but one make room, once it is."""
    staging = path.with_name(f".{path.name}.staging")
    main = accelerator.is_main_process
    if main:
        path.parent.mkdir(exist_ok=True)
        for left_over in path.parent.glob(".*"):
            shutil.rmtree(left_over)
        staging.mkdir()
    accelerator.wait_for_everyone()
    try:
        for name, tensors in files.items():
            save_file(tensors, staging / name)
        accelerator.wait_for_everyone()
        if not main:
            return
        (staging / "state.json").write_text(json.dumps(facts, allow_nan=False, default=asdict), encoding="utf-8")
        (staging / MANIFEST).write_bytes(_manifest(staging))
        artifacts.flush_all(staging)
        if path.exists():  # damaged, or the run would have gone on from it
            _remove(path)
        os.rename(staging, path)
    except (OSError, SafetensorError):
        shutil.rmtree(staging, ignore_errors=True)  # on a full disk its room is needed
        raise
    artifacts.flush(path.parent)
    states = _states(path.parent)
    here = states.index(path)
    for other in states[here + 1 :] + states[: max(0, here + 1 - KEPT)]:  # a later one was damaged, or passed over
        _remove(other)


def _remove(state: Path) -> None:
    """At once, for whoever looks."""
    gone = state.with_name(f".{state.name}.gone")
    os.rename(state, gone)
    shutil.rmtree(gone)


def newest(directory: Path) -> Path | None:
    """The newest state that is whole; one that is damaged is named, and passed over."""
    for path in reversed(_states(directory)):
        wrong = damage(path)
        if not wrong:
            return path
        console.say(f"  {path} is damaged and not used: {wrong}")
    return None


def damage(path: Path) -> str:
    """What is wrong with a state, or ""."""
    try:
        said = (path / MANIFEST).read_bytes()
        listed = json.loads(said)["files"]
        if said != _encoded(listed):
            return f"{MANIFEST} is not as it was written"
        for name, (size, sha) in listed.items():
            file = path / name
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} bytes of {size:,}"
            if _sha256(file) != sha:
                return f"{name} has other contents than were written"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return ""


def _manifest(directory: Path) -> bytes:
    return _encoded({file.name: [file.stat().st_size, _sha256(file)] for file in sorted(directory.iterdir())})


def _encoded(listed: Mapping[str, Any]) -> bytes:
    text = json.dumps({"version": VERSION, "files": listed}, indent=1, sort_keys=True)
    return json.dumps(
        {"version": VERSION, "files": listed, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    ).encode()


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _states(directory: Path) -> list[Path]:
    """By step. What is hidden is half made, or half gone."""
    return sorted(directory.glob("step-*")) if directory.is_dir() else []
