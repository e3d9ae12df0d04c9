"""Contenders of a training step: ours with shared prompts, ours with padded rows, and TRL's DPO trainer on pairs.

Every contender has a copy of the model and precomputed reference log-probs, uses AdamW and clips the gradient norm;
none reads from disk.
"""

import copy
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from benchmarks.harness import OURS
from benchmarks.step_workload import BETA, EPS, Problem
from exo.data.collate import Collator
from exo.models.attention import choose
from exo.training import preference, reference
from exo.training import step as training_step
from exo.training.optimizer import OptimizerSettings, optimizer

PADDED, TRL = "ours, padded", "TRL DPOTrainer, exo_pair"
RATE = 1e-9  # so small that a thousand steps do not change the model


class Contender(NamedTuple):
    """`step()` runs a training step; `first()` returns loss and gradient of a step without the update."""

    name: str
    step: Callable[[], Any]
    first: Callable[[], tuple[float, torch.Tensor]]


def contenders(problem: Problem, device: str) -> tuple[list[Contender], dict[str, str]]:
    """Return the contenders, and the reason for each absent one."""
    ours = [_ours(OURS, problem, device, "shared"), _ours(PADDED, problem, device, "padded")]
    if not problem.work.peers:
        return ours, {}
    try:
        return [*ours, _trl(problem, device)], {}
    except ModuleNotFoundError as error:
        return ours, {TRL: f"{error.name} is not installed"}


def _ours(name: str, problem: Problem, device: str, layout: Any) -> Contender:
    mixed = "bf16" if device == "cuda" else "no"
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed)
    model = copy.deepcopy(problem.model)
    collator = Collator(problem.tokenizer.pad_token_id, 10**9)
    if layout == "shared":
        collator = choose.choose_layout(
            [model.to(accelerator.device)], problem.groups, accelerator, collator, "on", 1.0
        )
        assert collator.layout == layout, collator
    groups = reference.score(model, problem.groups, accelerator, collator, 1.0, None)
    module = preference.PreferenceLoss(
        model, loss="exo", beta_pi=BETA, beta_r=1.0, label_smoothing=EPS, temperature=1.0
    )
    module.train(False)
    settings = OptimizerSettings(learning_rate=RATE)
    module, optim = accelerator.prepare(module, optimizer(module, settings))

    def gradient() -> float:
        parts = collator.micro_batches(groups)
        return training_step.accumulate(module, parts, len(groups), accelerator, collator.collate, 1)[0]

    def step() -> None:
        training_step.update(module, optim, settings.max_grad_norm, accelerator, 1, groups, gradient())

    def first() -> tuple[float, torch.Tensor]:
        loss = gradient()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()]).double().cpu()
        optim.zero_grad(set_to_none=True)
        return loss, flat

    return Contender(name, step, first)


def _trl(problem: Problem, device: str) -> Contender:
    """Return TRL's training step with the best options that run here: reference precomputed, no dropout."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=tempfile.mkdtemp(), loss_type=["exo_pair"], beta=BETA, label_smoothing=EPS, learning_rate=RATE,
        per_device_train_batch_size=len(problem.rows), precompute_ref_log_probs=True, max_length=None,
        gradient_checkpointing=False, bf16=device == "cuda", use_cpu=device == "cpu", report_to="none",
        max_grad_norm=1.0, disable_tqdm=True, max_steps=1, weight_decay=0.0,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=copy.deepcopy(problem.model), args=args, train_dataset=Dataset.from_list(problem.rows),
        processing_class=problem.tokenizer,
    )  # fmt: skip
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # as train() sets it
    model, optim = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    model.train()
    batches = trainer.get_train_dataloader()

    def gradient() -> float:
        (batch,) = batches  # collated in every step, as ours is
        return float(trainer.training_step(model, batch))

    def step() -> None:
        gradient()
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)

    def first() -> tuple[float, torch.Tensor]:
        loss = gradient()
        flat = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).double().cpu()
        optim.zero_grad(set_to_none=True)
        return loss, flat

    return Contender(TRL, step, first)
