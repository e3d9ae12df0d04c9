"""The step suite: a training step from tokens to the update, of a small Llama with random weights.

Ours with shared prompts, ours with padded rows and, on pairs, TRL's DPO trainer as it is shipped. Every contender has a
copy of the model, uses AdamW and clips the gradient norm. Reading and tokenizing happen once per run and are not timed.
"""

import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from benchmarks.harness import BODY, OURS, PADDED, Contender, Options, Prepared
from exo import data, models
from exo.data.collate import Collator
from exo.data.text import tokenize
from exo.data.text.tokenize import TokenizedExample
from exo.models.attention import choose
from exo.training import preference, reference
from exo.training import step as training_step
from exo.training.optimizer import OptimizerSettings, optimizer

SUITE = "step"
TRL, TRL_LIVE = "TRL DPOTrainer", "TRL DPOTrainer, live reference"
LIMITS = tokenize.Limits(10**6, None, "error")
BETA, EPS = 0.1, 1e-3
RATE = 1e-9  # so small that a thousand steps do not change the model
TOLERANCE = {"cpu": 1e-4, "cuda": 5e-2}  # relative; the layouts and TRL's sums round differently


@dataclass(frozen=True)
class Case:
    """A batch of `prompts` groups of K completions; lengths are in tokens, with the end of sequence."""

    group_size: int
    prompt: int
    completion: int
    prompts: int = 4
    hidden: int = 256
    layers: int = 4
    vocab: int = 32000
    rounds: int = 5
    pairs: bool = False  # without rewards, as TRL's trainer needs them
    suite: str = SUITE
    unit: str = "k tokens/s"

    def __str__(self) -> str:
        return f"K{self.group_size}-{self.prompt}:{self.completion}-D{self.hidden}-V{self.vocab}"

    @property
    def work(self) -> float:
        """Tokens of padded rows for all, so that the rate compares work done."""
        return self.prompts * self.group_size * (self.prompt + self.completion)

    @property
    def title(self) -> str:
        return (
            f"a training step, K={self.group_size}, {self.prompts} prompts of {self.prompt} tokens, completions of "
            f"{self.completion}; {self.layers} layers, D={self.hidden}, V={self.vocab:,}"
        )

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "K": self.group_size, "prompt": self.prompt, "completion": self.completion, "D": self.hidden,
            "layers": self.layers, "V": self.vocab, "pairs": self.pairs,
        }  # fmt: skip

    def prepare(self, options: Options) -> Prepared:
        problem = make(self, options.device)
        steps = {PADDED: _ours(problem, options.device, "padded"), OURS: _ours(problem, options.device, "shared")}
        absent: dict[str, str] = {}
        for name, precomputed in ((TRL, True), (TRL_LIVE, False)) if options.peers else ():
            if not self.pairs:
                absent[name] = "cannot: pairs only (K = 2)"
                continue
            try:
                steps[name] = _trl(problem, options.device, precomputed)
            except ModuleNotFoundError as error:
                absent[name] = f"not installed ({error}): pip install 'trl'"
            except Exception as error:  # another version of TRL, or out of memory
                absent[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        tolerance = TOLERANCE[options.device]
        contenders = [Contender(name, step.run, step.first, tolerance) for name, step in steps.items()]
        return Prepared([Contender(BODY, _body(problem, options.device), None), *contenders], absent, _errors)


def cases(device: str, full: bool) -> list[Case]:
    if device == "cuda":
        wide = {"prompts": 8, "hidden": 2048, "layers": 16, "vocab": 128256, "rounds": 10}
        found = [Case(2, 512, 512, pairs=True, **wide)]
        return found + [Case(4, p, 2048 - p, **wide) for p in (512, 1024, 1792)] if full else found
    # with 10 million parameters: most of them in the head (small D, large V), or most of them in the body
    found = [Case(2, 256, 64, pairs=True), Case(4, 256, 64, hidden=384, layers=6, vocab=4096)]
    lengths = ((256, 32), (128, 128), (32, 256))
    return found + [Case(k, p, c, vocab=8192, rounds=3) for k in (2, 4, 8) for p, c in lengths] if full else found


class Problem(NamedTuple):
    case: Case
    model: Any
    tokenizer: Any
    rows: list[dict[str, Any]]  # texts
    groups: list[TokenizedExample]  # the same texts as tokens


class Step(NamedTuple):
    """`run()` is a training step; `first()` returns loss and gradient of a step without the update."""

    run: Callable[[], Any]
    first: Callable[[], tuple[Any, ...]]


@functools.cache
def _model(hidden: int, layers: int, vocab: int) -> tuple[Any, Any]:
    words = [f"w{i}" for i in range(vocab - 3)]
    return models.word_level(words, hidden_size=hidden, num_layers=layers, num_heads=max(4, hidden // 64))


def make(case: Case, device: str) -> Problem:
    model, tokenizer = _model(case.hidden, case.layers, case.vocab)
    generator = torch.Generator().manual_seed(0)

    def text(n: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(case.vocab - 3, (n,), generator=generator).tolist())

    rows, groups = [], []
    for i in range(1, case.prompts + 1):
        # a leading blank for trainers that concatenate prompt and completion; the last token is the end of sequence
        completions = tuple(f" {text(case.completion - 1)}" for _ in range(case.group_size))
        rewards = tuple(torch.rand(case.group_size, generator=generator).tolist())
        row = {"prompt": text(case.prompt), "chosen": completions[0], "rejected": completions[1]}
        rows.append(row)
        groups.append(data.Example(row["prompt"], completions, None if case.pairs else rewards, i))
    encoded, counts = tokenize.encode(groups, tokenizer, LIMITS, "benchmark")
    assert not counts and all(len(a) == case.completion for group in encoded for a in group.completions)
    return Problem(case, model.to(device), tokenizer, rows, encoded)


def _errors(outputs: dict[str, tuple[Any, ...]]) -> dict[str, dict[str, float]]:
    """Return the relative distances from ours with padded rows, whose loss and gradient the tests check."""
    true_loss, true_gradient = outputs[PADDED]
    norm = true_gradient.norm()
    return {
        name: {
            "loss": abs(loss - true_loss) / abs(true_loss),
            "gradient": float((gradient - true_gradient).norm() / norm),
        }
        for name, (loss, gradient) in outputs.items()
    }


def _flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu().double()


def _ours(problem: Problem, device: str, layout: str) -> Step:
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if device == "cuda" else "no")
    model = copy.deepcopy(problem.model)
    collator = Collator(problem.tokenizer.pad_token_id, 10**9)
    if layout == "shared":
        collator = choose.choose_layout(
            [model.to(accelerator.device)], problem.groups, accelerator, collator, "on", 1.0
        )  # fmt: skip
        assert collator.layout == layout, collator
    groups = reference.score(model, problem.groups, accelerator, collator, 1.0, None)
    module = preference.PreferenceLoss(
        model, loss="exo", beta_pi=BETA, beta_r=1.0, label_smoothing=EPS, temperature=1.0
    )  # fmt: skip
    module.train(False)
    settings = OptimizerSettings(learning_rate=RATE)
    module, optim = accelerator.prepare(module, optimizer(module, settings))

    def gradient() -> float:
        parts = collator.micro_batches(groups)
        return training_step.accumulate(module, parts, len(groups), accelerator, collator.collate, 1)[0]

    def run() -> None:
        training_step.update(module, optim, settings.max_grad_norm, accelerator, 1, groups, gradient())

    def first() -> tuple[float, torch.Tensor]:
        loss = gradient()
        flat = _flat_gradient(model)
        optim.zero_grad(set_to_none=True)
        return loss, flat

    return Step(run, first)


def _body(problem: Problem, device: str) -> Callable[[], None]:
    """Return forward and backward of the transformer without its head, over the padded rows."""
    model = copy.deepcopy(problem.model).base_model
    rows = [group.prompt + answer for group in problem.groups for answer in group.completions]
    tokens = torch.tensor(rows, device=device)  # (N, T), all of one length

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            model(tokens, use_cache=False).last_hidden_state.sum().backward()

    return run


def _trl(problem: Problem, device: str, precomputed: bool) -> Step:
    """Return TRL's own training step, with its fused head. `precomputed`: the reference's log-probs are made before."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    folder = tempfile.TemporaryDirectory()
    args = DPOConfig(
        output_dir=folder.name, loss_type=["exo_pair"], beta=BETA, label_smoothing=EPS, learning_rate=RATE,
        per_device_train_batch_size=len(problem.rows), precompute_ref_log_probs=precomputed, max_length=None,
        gradient_checkpointing=False, bf16=device == "cuda", use_cpu=device == "cpu", report_to="none",
        max_grad_norm=1.0, disable_tqdm=True, max_steps=1, weight_decay=0.0,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=copy.deepcopy(problem.model), ref_model=None if precomputed else copy.deepcopy(problem.model), args=args,
        train_dataset=Dataset.from_list(problem.rows), processing_class=problem.tokenizer,
    )  # fmt: skip
    folder.cleanup()
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # as train() sets it
    model, optim = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    model.train()
    batches = trainer.get_train_dataloader()

    def gradient() -> float:
        (batch,) = batches  # collated in every step, as ours is
        return float(trainer.training_step(model, batch))

    def run() -> None:
        gradient()
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)

    def first() -> tuple[float, torch.Tensor]:
        loss = gradient()
        flat = _flat_gradient(trainer.model)
        optim.zero_grad(set_to_none=True)
        return loss, flat

    return Step(run, first)
