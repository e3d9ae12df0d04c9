"""What a training run is at a step, so that one that was killed goes on as if it had not been: what is trained, the
optimizer, all random states, the position in the data and in the log, and counters.

The newest state that is whole is gone on from, by as many processes as there are then. Left out: the files (states),
and models to be used (models.save_checkpoint).
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from exo.cli import console
from exo.cli.errors import RunError
from exo.distributed import deepspeed, fsdp
from exo.models import weights
from exo.runs import record as run_record
from exo.runs.jsonl import JsonlLog
from exo.training import checkpoint_files


class Stateful(Protocol):
    """A part of a run that goes on from what it says of itself, in JSON."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


Tensors = dict[str, Tensor]


class RandomState(NamedTuple):
    torch: Tensor
    cuda: Tensor | None
    numpy: Any
    python: Any


class TrainState(NamedTuple):
    """Where a run stood after a step. Until the next update weights and optimizer belong to it too."""

    step: int
    metrics: int  # bytes of the log
    random: RandomState  # of this process
    counters: dict[str, float]
    parts: dict[str, dict[str, Any]]


class Checkpointer:
    """Saves the state of one run, and brings it back."""

    def __init__(
        self,
        run: Path,
        module: nn.Module,
        optim: Any,
        accelerator: Accelerator,
        metrics: JsonlLog,
        parts: Mapping[str, Stateful],
        *,
        allow_changes: bool,
        limit: int = 2,
        resume_from: str | None = None,
    ) -> None:
        """`resume_from` is a checkpoint's directory, "true" for the newest, which must exist, or None."""
        self.directory = run / run_record.STATES
        self.module, self.accelerator = accelerator.unwrap_model(module), accelerator
        self.zero, self.stage = optim, deepspeed.stage(optim)
        self.optim: torch.optim.Optimizer = getattr(optim, "optimizer", optim)
        self.metrics, self.parts, self.allow_changes = metrics, parts, allow_changes
        self.limit, self.resume_from = limit, resume_from
        self.sharded = fsdp.is_sharded(module)
        self.position: TrainState | None = None
        self.last: Path | None = None  # the state that was written or gone on from last

    def restore(self) -> TrainState | None:
        """Bring back the newest whole state; None where there is none, and the log is emptied then."""
        path = self._find()
        if path is None:
            self._cut(0)
            return None
        facts = json.loads((path / checkpoint_files.FACTS).read_text(encoding="utf-8"))
        was = _how(facts["processes"], facts["sharded"], facts.get("zero", 0))
        now = _how(self.accelerator.num_processes, self.sharded, self.stage)
        if bool(facts.get("zero", 0)) != bool(self.stage):
            how = "without" if self.stage else "with"
            raise RunError(
                f"{path}: of a run {how} DeepSpeed, which keeps moments in other parts, so that it goes on {how} "
                "DeepSpeed only; --overwrite_output_dir begins anew"
            )
        if was != now and not self.allow_changes:
            raise RunError(
                f"{path}: of a run with {was}; this one has {now}; with --allow_changes it goes on, to the rounding "
                "of another order of sums"
            )
        self._fill(path / checkpoint_files.TENSORS)
        if self.accelerator.scaler is not None and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        for name, part in self.parts.items():
            part.restore(facts["parts"][name])
        of_this_run = path.resolve().parent == self.directory.resolve()
        if of_this_run and self.accelerator.is_main_process and self.metrics.size() < facts["metrics"]:
            raise RunError(
                f"{path}: expected {facts['metrics']:,} bytes of {self.metrics.path}; it has fewer, and so is "
                "not this state's; --overwrite_output_dir begins anew"
            )
        self._cut(facts["metrics"] if of_this_run else 0)  # the log of another run stays there
        console.log(f"going on after step {facts['step']:,}, from {path}")
        self.last = path
        return self.mark(facts["step"], facts["counters"])

    def _find(self) -> Path | None:
        """Return the checkpoint to resume from, or None; RunError if it is damaged, or is asked for and not there."""
        if self.resume_from is not None and self.resume_from.lower() != "true":
            named = Path(self.resume_from)
            if damage := checkpoint_files.find_damage(named, self.accelerator):
                raise RunError(f"--resume_from_checkpoint {named}: the checkpoint is damaged: {damage}")
            return named
        path = checkpoint_files.newest(self.directory, self.accelerator)
        if path is None and any(self.directory.glob("step-*")):  # may be transient; let the user decide to start over
            raise RunError(f"{self.directory}: none of its states is whole; --overwrite_output_dir begins the run anew")
        if path is None and self.resume_from is not None:
            raise RunError(f"--resume_from_checkpoint {self.resume_from}: {self.directory} has no checkpoint")
        return path

    def _cut(self, size: int) -> None:
        if self.accelerator.is_main_process:
            self.metrics.cut(size)

    def mark(self, step: int, counters: Mapping[str, float]) -> TrainState:
        """This is where the run stands, after an update; cheap, because it is said after each."""
        parts = {name: part.state() for name, part in self.parts.items()}
        drawn = _random(self.accelerator.device)
        self.position = TrainState(step, self.metrics.size(), drawn, dict(counters), parts)
        return self.position

    def save(self) -> Path | None:
        """Write the state of the position last marked. Called by all processes; None before the first.

        RunError if a weight is not finite: every run that resumed from such a state would fail.
        """
        position = self.position
        if position is None:
            return None
        path = self.directory / f"step-{position.step}"
        if path == self.last:
            return path
        kept = {name.partition(".")[2]: tensor for name, tensor in self._weights().items()}
        no_state = f"no resumable checkpoint of step {position.step:,} is written"
        weights.refuse_not_finite(kept.items(), no_state, self.accelerator)
        self.metrics.flush()  # no state says more than the log holds, whatever is cut off
        drawn = _as_tensors(position.random)
        gathered = {f"random.{name}": self.accelerator.gather(state[None].to(self.accelerator.device)).cpu()
                    for name, state in drawn.items()}  # fmt: skip
        scaler = self.accelerator.scaler
        facts = position._asdict() | {"processes": self.accelerator.num_processes, "random": None}
        facts |= {"sharded": self.sharded, "zero": self.stage}
        facts |= {"scaler": None if scaler is None else scaler.state_dict()}
        try:
            checkpoint_files.write(
                path, self._weights() | self._moments() | gathered, facts, self.accelerator, self.limit
            )
        except checkpoint_files.CheckpointNotWritten as error:
            raise RunError(
                f"step {position.step}: its state could not be written to {self.directory}: {error}"
            ) from error
        self.last = path
        return path

    def kept(self) -> str:
        """What a run that ends early goes on from, for its last words; "" for nothing."""
        return f"; the last whole state is {self.last}, from which the same command goes on" if self.last else ""

    def _weights(self) -> Tensors:
        """What is trained, and buffers that a model keeps."""
        lasting = self.module.state_dict().keys()
        found = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        found |= {name: b for name, b in self.module.named_buffers() if name in lasting}
        return {f"weights.{name}": tensor.detach() for name, tensor in found.items()}

    def _moments(self) -> Tensors:
        if self.stage:
            return {f"optimizer.{name}": tensor for name, tensor in deepspeed.moments(self.zero).items()}
        return {
            f"optimizer.{name}.{kind}": tensor
            for name, parameter in self.module.named_parameters()
            for kind, tensor in self.optim.state.get(parameter, {}).items()
        }

    def _fill(self, path: Path) -> None:
        """Weights, moments and random states, from those in the files."""
        saved = checkpoint_files.kinds(path)
        into = self._weights()
        expected = {name: tuple(tensor.shape) for name, tensor in into.items()}
        found = {name: kind.shape for name, kind in saved.items() if name.startswith("weights.")}
        if expected != found:
            odd = min(name for name in {*expected, *found} if expected.get(name) != found.get(name))
            raise RunError(
                f"{path}: of another model: {odd} is {found.get(odd, 'not there')}, expected "
                f"{expected.get(odd, 'none')}; --overwrite_output_dir begins anew"
            )
        own, parts = dict(self.module.named_parameters()), dict[str, Tensor]()
        for key, kind in saved.items():
            if not key.startswith("optimizer."):
                continue
            name, _, moment = key.removeprefix("optimizer.").rpartition(".")
            if self.stage:
                into[key] = parts[f"{name}.{moment}"] = deepspeed.room(self.zero, name, moment, kind.shape)
            else:
                into[key] = self.optim.state[own[name]][moment] = _place(kind, own[name])
        drawn = {name: torch.empty(kind.shape, dtype=kind.dtype) for name, kind in saved.items() if name not in into}
        checkpoint_files.read(path, into | drawn)
        if self.stage:
            deepspeed.fill(self.zero, parts)
        rank = self.accelerator.process_index
        if rank < len(drawn["random.torch"]):
            mine = {name.removeprefix("random."): rows[rank].clone() for name, rows in drawn.items()}
            _set_random(mine, self.accelerator.device)


def _how(count: int, sharded: bool, stage: int) -> str:
    return f"{count} process{'es' * (count > 1)}{', in shards' * sharded}{f', with ZeRO {stage}' * (stage > 0)}"


def _place(kind: checkpoint_files.Kind, parameter: Tensor) -> Tensor:
    """For a moment of a parameter, in its shards; or for its count of steps."""
    if kind.shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=kind.dtype)
    return torch.zeros(kind.shape, dtype=kind.dtype, device=parameter.device)


def _random(device: torch.device) -> RandomState:
    """Of torch, on the CPU and this process's GPU, of numpy and of Python, as each of them gives it."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(torch.get_rng_state(), cuda, numpy.random.get_state(), random.getstate())


def _as_tensors(state: RandomState) -> Tensors:
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
