"""Sample the models that a run exported on the same prompts, and score the samples under each and the reference."""

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from exo import data, models
from exo.data import Example
from exo.data.text import render
from exo.data.text.limits import Limits
from exo.distributed.accelerator import Accelerator
from exo.models.logps import ScoringModels, Tokens
from exo.rollouts import samples, shards
from exo.rollouts.samples import Settings


class Checkpoint(NamedTuple):
    """A model of a run."""

    name: str
    step: int | None
    path: str  # a model directory


def list_checkpoints(model: str) -> list[Checkpoint]:
    """Return the models that a run exported while it trained, in order of their steps, and then its final model."""
    directory = Path(model)
    log = directory / "metrics.jsonl"
    last = max((row["step"] for _, row in data.read_jsonl(log)), default=None) if log.exists() else None
    exported = [Checkpoint(path.name, int(path.name[5:]), str(path)) for path in directory.glob("models/step-*")]
    earlier = sorted((c for c in exported if c.step != last), key=lambda c: c.step or 0)
    return [*earlier, Checkpoint("final", last, model)]


@dataclass(frozen=True)
class CheckpointSampler:
    """Sample completions of the prompts, `k` per prompt, from one model after another."""

    prompts: Sequence[str]
    settings: Settings
    k: int
    seed: int
    batch_size: int  # completions
    max_length: int  # tokens of prompt and completion; a longer prompt loses its beginning
    max_tokens_per_batch: int
    accelerator: Accelerator

    def sample(
        self,
        checkpoints: Sequence[Checkpoint],
        reference: Any,
        chat_template: str,
        template_kwargs: str | None,
        date: datetime.date,
    ) -> Iterator[tuple[Checkpoint, list[Example], ScoringModels]]:
        """Yield each checkpoint with its samples, and its model with the reference; load one model at a time."""
        limits = Limits(self.max_length, None, "prompt-left", self._max_prompt_length)
        temperature = self.settings.temperature
        for checkpoint in checkpoints:
            model, tokenizer = models.load(checkpoint.path)
            render.configure(tokenizer, chat_template, template_kwargs, date)
            model.to(self.accelerator.device)
            scoring_models = ScoringModels(
                model, reference, tokenizer, self.accelerator, self.max_tokens_per_batch, limits, temperature
            )
            yield checkpoint, self._draw(scoring_models, self.settings), scoring_models

    def log_ratios(self, scoring_models: ScoringModels, examples: Sequence[Example]) -> tuple[Tokens, Tokens]:
        """Return log pi - log ref of each token of the examples, and of samples of the full distribution.

        If top_p is below 1, the examples are samples of another distribution, and the mean of their log-ratios would be
        a biased KL. Therefore the second are those of new samples.
        """
        ratios = scoring_models.log_ratios(examples)
        if self.settings.top_p == 1:
            return ratios, ratios
        return ratios, scoring_models.log_ratios(self._draw(scoring_models, self.settings._replace(top_p=1.0)))

    def _draw(self, scoring_models: ScoringModels, settings: Settings) -> list[Example]:
        with self.accelerator.autocast():
            return samples.draw(
                scoring_models.policy,
                scoring_models.tokenizer,
                self.prompts,
                settings,
                k=self.k,
                max_prompt_length=self._max_prompt_length,
                seed=self.seed,
                batch_size=self.batch_size,
                run=partial(shards.sample_shared, accelerator=self.accelerator),
            )

    @property
    def _max_prompt_length(self) -> int:
        return self.max_length - self.settings.max_new_tokens
