"""Evaluate and export the policy while it trains."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from exo import models
from exo.cli import console
from exo.data.collate import Collator
from exo.data.text.tokenize import TokenizedExample
from exo.runs import plots
from exo.runs.jsonl import JsonlLog
from exo.training import preference


class Evaluator:
    """Called after each update: evaluates, exports models, keeps the best by held-out loss."""

    def __init__(
        self,
        module: preference.PreferenceLoss,
        examples: Sequence[TokenizedExample],  # held out; may be empty
        collator: Collator,
        accelerator: Accelerator,
        metrics: JsonlLog,
        *,
        eval_steps: int,  # 0: at the end only
        export_steps: int,  # 0: never
        export: Callable[[str], None],  # saves the model as it is under a name
    ) -> None:
        self.module, self.examples, self.collator = module, examples, collator
        self.accelerator, self.metrics = accelerator, metrics
        self.eval_steps, self.export_steps, self.export = eval_steps, export_steps, export
        self.best = float("inf")
        self.last: dict[str, float] = {}

    def __call__(self, step: int, last: bool) -> None:
        if self.examples and (last or (self.eval_steps and step % self.eval_steps == 0)):
            self._evaluate(step)
        if self.export_steps and step % self.export_steps == 0:
            self.export(f"step-{step}")

    def state(self) -> dict[str, float | None]:
        return {"best": self.best if self.best < float("inf") else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.best = float("inf") if state["best"] is None else state["best"]

    def _evaluate(self, step: int) -> None:
        self.last = preference.evaluate(self.module, self.examples, self.accelerator, self.collator)
        if self.accelerator.is_main_process:
            self.metrics.write(step=step, **self.last)
            self.accelerator.log(self.last, step=step)
        console.log(f"  evaluation after step {step}: {_line(self.last, len(self.examples))}")
        if self.eval_steps and self.last["eval_loss"] < self.best:
            self.best = self.last["eval_loss"]
            self.export("best")

    def conclude(self, directory: Path) -> None:
        """Print what the finished run left in its directory."""
        console.headline("Done")
        if self.last:
            console.log(f"held-out: {_line(self.last, len(self.examples))}")
        console.log(f"model: {directory}  (AutoModelForCausalLM.from_pretrained({str(directory)!r}))")
        if self.best < float("inf"):
            console.log(f"best model by held-out loss: {directory / 'models' / 'best'}")
        console.log(f"picture: {directory / plots.TRAINING}")


def export(
    name: str, directory: Path, finish: Callable[[], Any], tokenizer: Any, dtypes: models.Dtypes, is_main: bool
) -> None:
    """Save the model that `finish` returns in models/`name` of a run; all ranks call, the main one writes."""
    finished = finish()
    if is_main:
        models.export_model(finished, tokenizer, directory, name, dtypes)


def _line(result: Mapping[str, float], n: int) -> str:
    """Return an evaluation of `n` held-out prompts on one line."""
    parts = [f"loss {result['eval_loss']:.4f}"]
    if "eval_rewards/accuracies" in result:
        parts.append(
            f"accuracy {100 * result['eval_rewards/accuracies']:.1f}% "
            f"(95% interval {100 * result['eval_accuracy_low']:.1f} to {100 * result['eval_accuracy_high']:.1f}), "
            f"margin {result['eval_rewards/margins']:+.4f}"
        )
    return ", ".join(parts) + f", {n:,} held-out prompts"
