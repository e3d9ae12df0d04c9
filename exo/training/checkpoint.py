"""Training checkpoints: weights, optimizer, random states, data position, metrics offset.

Training resumes from the newest intact checkpoint, on any number of ranks, bit-exactly on as many as before.
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
    """A part of a run whose state is JSON."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


Tensors = dict[str, Tensor]


class RandomState(NamedTuple):
    """The random states of one rank, as torch, numpy and Python return them."""

    torch: Tensor
    cuda: Tensor | None
    numpy: Any
    python: Any


class TrainState(NamedTuple):
    """Where a run stands after a step; the weights and the optimizer belong to it until the next update."""

    step: int
    metrics: int  # size of the log in bytes
    random: RandomState  # of this rank
    counters: dict[str, float]
    parts: dict[str, dict[str, Any]]


class Checkpointer:
    """Saves and restores the state of a run."""

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
        self.last: Path | None = None  # the checkpoint last written or resumed from

    def restore(self) -> TrainState | None:
        """Restore the checkpoint to resume from; return None, and empty the log, if there is none.

        RunError if no checkpoint is intact, or the one found does not fit this run.
        """
        path = self._find()
        if path is None:
            self._cut(0)
            return None
        facts = json.loads((path / checkpoint_files.FACTS).read_text(encoding="utf-8"))
        self._check_layout(path, facts)
        self._fill(path / checkpoint_files.TENSORS)
        if self.accelerator.scaler is not None and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        for name, part in self.parts.items():
            part.restore(facts["parts"][name])
        of_this_run = path.resolve().parent == self.directory.resolve()
        if of_this_run and self.accelerator.is_main_process and self.metrics.size() < facts["metrics"]:
            raise RunError(
                f"{path}: expected {facts['metrics']:,} bytes of {self.metrics.path} or more; the log is not this "
                "checkpoint's; pass --overwrite_output_dir to start over"
            )
        self._cut(facts["metrics"] if of_this_run else 0)  # the log of another run stays there
        console.log(f"resuming after step {facts['step']:,} from {path}")
        self.last = path
        return self.mark(facts["step"], facts["counters"])

    def _find(self) -> Path | None:
        """Return the checkpoint to resume from, or None; RunError if all are damaged, or a requested one is missing."""
        if self.resume_from is not None and self.resume_from.lower() != "true":
            named = Path(self.resume_from)
            if damage := checkpoint_files.find_damage(named, self.accelerator):
                raise RunError(f"--resume_from_checkpoint {named}: the checkpoint is damaged: {damage}")
            return named
        path = checkpoint_files.newest(self.directory, self.accelerator)
        if path is None and any(self.directory.glob("step-*")):  # may be transient; let the user decide to start over
            raise RunError(f"{self.directory}: no checkpoint is intact; pass --overwrite_output_dir to start over")
        if path is None and self.resume_from is not None:
            raise RunError(f"--resume_from_checkpoint {self.resume_from}: {self.directory} has no checkpoint")
        return path

    def _check_layout(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Raise RunError unless the checkpoint was written by the same kind and number of ranks."""
        saved = _layout(facts["processes"], facts["sharded"], facts["zero"])
        current = _layout(self.accelerator.num_processes, self.sharded, self.stage)
        if bool(facts["zero"]) != bool(self.stage):
            how = "without" if self.stage else "with"
            raise RunError(
                f"{path}: saved by a run {how} DeepSpeed, which splits the moments in another way; resume {how} "
                "DeepSpeed, or pass --overwrite_output_dir to start over"
            )
        if saved != current and not self.allow_changes:
            raise RunError(
                f"{path}: saved by a run with {saved}; this one has {current}; pass --allow_changes to resume with the "
                "rounding of another order of sums"
            )

    def _cut(self, size: int) -> None:
        if self.accelerator.is_main_process:
            self.metrics.cut(size)

    def mark(self, step: int, counters: Mapping[str, float]) -> TrainState:
        """Note where the run stands after an update, and return it; cheap, because it is called after each."""
        parts = {name: part.state() for name, part in self.parts.items()}
        random_state = _random_state(self.accelerator.device)
        self.position = TrainState(step, self.metrics.size(), random_state, dict(counters), parts)
        return self.position

    def save(self) -> Path | None:
        """Write a checkpoint of the step last marked, and return its directory; None before the first step.

        All ranks call. RunError if a weight is not finite: every run that resumed from it would fail.
        """
        position = self.position
        if position is None:
            return None
        path = self.directory / f"step-{position.step}"
        if path == self.last:
            return path
        named = {name.partition(".")[2]: tensor for name, tensor in self._weights().items()}
        consequence = f"no resumable checkpoint of step {position.step:,} is written"
        weights.refuse_not_finite(named.items(), consequence, self.accelerator)
        self.metrics.flush()  # before the checkpoint, which holds the log's size
        gathered = {
            f"random.{name}": self.accelerator.gather(state[None].to(self.accelerator.device)).cpu()
            for name, state in _as_tensors(position.random).items()
        }
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
                f"step {position.step}: the checkpoint could not be written to {self.directory}: {error}"
            ) from error
        self.last = path
        return path

    def hint(self) -> str:
        """Return the end of an error message: how to resume, or "" without a checkpoint."""
        return checkpoint_files.resume_hint(self.last)

    def _weights(self) -> Tensors:
        """Return the trained parameters and the persistent buffers."""
        persistent = self.module.state_dict().keys()
        tensors = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        tensors |= {name: b for name, b in self.module.named_buffers() if name in persistent}
        return {f"weights.{name}": tensor.detach() for name, tensor in tensors.items()}

    def _moments(self) -> Tensors:
        """Return the optimizer's tensors by parameter.

        torch's get_state_dict adds 12 scalars a parameter, which safetensors cannot hold, and set_state_dict takes no
        tensors without them.
        """
        if self.stage:
            return {f"optimizer.{name}": tensor for name, tensor in deepspeed.moments(self.zero).items()}
        return {
            f"optimizer.{name}.{kind}": tensor
            for name, parameter in self.module.named_parameters()
            for kind, tensor in self.optim.state.get(parameter, {}).items()
        }

    def _fill(self, path: Path) -> None:
        """Read weights, moments and random states from the files."""
        saved = checkpoint_files.kinds(path)
        into = self._weights()
        expected = {name: tuple(tensor.shape) for name, tensor in into.items()}
        shapes = {name: kind.shape for name, kind in saved.items() if name.startswith("weights.")}
        if expected != shapes:
            odd = min(name for name in {*expected, *shapes} if expected.get(name) != shapes.get(name))
            raise RunError(
                f"{path}: saved from another model: {odd} is {shapes.get(odd, 'missing')}, expected "
                f"{expected.get(odd, 'none')}; pass --overwrite_output_dir to start over"
            )
        parameters, parts = dict(self.module.named_parameters()), dict[str, Tensor]()
        for key, kind in saved.items():
            if not key.startswith("optimizer."):
                continue
            name, _, moment = key.removeprefix("optimizer.").rpartition(".")
            if self.stage:
                into[key] = parts[f"{name}.{moment}"] = deepspeed.empty_moment(self.zero, name, moment, kind.shape)
            else:
                into[key] = self.optim.state[parameters[name]][moment] = _empty_moment(kind, parameters[name])
        random_states = {
            name: torch.empty(kind.shape, dtype=kind.dtype) for name, kind in saved.items() if name not in into
        }
        checkpoint_files.read(path, into | random_states)
        if self.stage:
            deepspeed.fill(self.zero, parts)
        rank = self.accelerator.process_index
        if rank < len(random_states["random.torch"]):
            local = {name.removeprefix("random."): rows[rank].clone() for name, rows in random_states.items()}
            _set_random_state(local, self.accelerator.device)


def _layout(count: int, sharded: bool, stage: int) -> str:
    return f"{count} process{'es' * (count > 1)}{', in shards' * sharded}{f', with ZeRO {stage}' * (stage > 0)}"


def _empty_moment(kind: checkpoint_files.Kind, parameter: Tensor) -> Tensor:
    """Return zeros for a moment of a parameter, sharded like it, or for its count of steps."""
    if kind.shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=kind.dtype)
    return torch.zeros(kind.shape, dtype=kind.dtype, device=parameter.device)


def _random_state(device: torch.device) -> RandomState:
    """Return the states of torch, on the CPU and on this rank's GPU, of numpy and of Python."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(torch.get_rng_state(), cuda, numpy.random.get_state(), random.getstate())


def _as_tensors(state: RandomState) -> Tensors:
    """Return the states as tensors; the integers are below 2^53, and so exact in doubles."""
    _, keys, *rest = state.numpy
    version, numbers, gauss = state.python
    python = [version, *numbers, float("nan") if gauss is None else gauss]
    tensors = {
        "torch": state.torch,
        "numpy": torch.tensor([*map(int, keys), *rest], dtype=torch.float64),
        "python": torch.tensor(python, dtype=torch.float64),
    }
    return tensors if state.cuda is None else tensors | {"cuda": state.cuda}


def _set_random_state(states: Tensors, device: torch.device) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
    *keys, place, has_gauss, gauss = states["numpy"].tolist()
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), int(place), int(has_gauss), gauss))
    version, *numbers, gauss = states["python"].tolist()
    random.setstate((int(version), tuple(map(int, numbers)), None if gauss != gauss else gauss))
