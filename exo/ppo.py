"""PPO, the paper's baseline: maximize a reward with a KL penalty on every token.

    python -m exo.ppo --model DIR_OR_NAME --data PROMPTS (--reward_model DIR | --oracle module:function)

Clipped objective, a separate critic with a clipped loss, and at first the critic alone, with the actor frozen, as in
the paper's appendix C. The run directory is the model directory; the critic is not saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exo.cli import console
from exo.cli.fields import MODEL, NOT_NEGATIVE, POSITIVE, SHARE, at_least, named, option, require
from exo.cli.main import command
from exo.cli.options import ChatOptions, DataOptions, ScorerOptions, Training
from exo.runs.stage import Start, stage

if TYPE_CHECKING:
    from exo.data.collate import Collator
    from exo.rollouts import experience
    from exo.training.loop import Task
    from exo.training.ppo import ActorCritic

SHOWN = {"score": "score", "kl": "kl", "cut": "cut", "value_loss": "value", "tokens_per_second": "update tok/s"}


@dataclass(frozen=True)
class Config(Training, DataOptions, ChatOptions, ScorerOptions):
    output_dir: str = option("runs/ppo", "directory of the run")
    model: str = option("", "directory or hub name of a causal LM: the initial policy and the reference", MODEL)
    data: str = option("", "prompts: any data file that has them", named("a file of prompts"))
    max_steps: int = option(200, "optimizer steps, including those of the critic alone", at_least(1))
    batch_size: int = option(64, "completions per optimizer step, over all processes", at_least(1))
    rollout_size: int = option(128, "completions sampled at a time", at_least(1))
    ppo_epochs: int = option(2, "passes over the sampled completions", at_least(1))
    critic_warmup_steps: int = option(20, "train the critic alone for the first N steps", NOT_NEGATIVE)
    critic_learning_rate: float = option(5e-6, "peak learning rate of the critic", POSITIVE)
    kl_coef: float = option(0.1, "penalty per nat of log pi - log pi_ref", NOT_NEGATIVE)
    temperature: float = option(1.0, "divides the logits", POSITIVE)
    max_new_tokens: int = option(256, "tokens of a completion, including its end of sequence", at_least(1))
    gamma: float = option(1.0, "discount of a token's reward", SHARE)
    lam: float = option(0.95, "GAE's lambda", SHARE)
    clip_range: float = option(0.2, "clip the probability ratio to 1 +- this", POSITIVE)
    clip_range_value: float = option(
        0.2, "clip the change of a value in one update, in units of the reward, once the actor learns", POSITIVE
    )
    value_coef: float = option(0.5, "weight of the critic's loss", NOT_NEGATIVE)
    export_steps: int = option(
        0, "save a loadable model every N steps, in output_dir/models/step-N (0: only at the end)", NOT_NEGATIVE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        no_decay = not (self.critic_warmup_steps and self.weight_decay)
        require(no_decay, "weight_decay", "0 with --critic_warmup_steps: a frozen actor would decay", self.weight_decay)
        require(self.max_length > self.max_new_tokens, "max_length", "more than max_new_tokens", self.max_length)
        warmup = self.critic_warmup_steps
        expected = f"less than --max_steps {self.max_steps} (0 for short runs)"
        require(warmup < self.max_steps, "critic_warmup_steps", expected, warmup)
        divides = self.rollout_size % self.batch_size == 0
        require(divides, "rollout_size", f"a multiple of --batch_size {self.batch_size}", self.rollout_size)


@stage("ppo", reads=("model", "data", "reward_model", "oracle"), makes=".")
def run(config: Config, start: Start) -> Path:
    """Train and return the run directory, which is the model directory."""
    import copy

    from exo import data, models
    from exo.data.text import render, tokenize
    from exo.distributed import accelerator as distributed
    from exo.distributed import fsdp, gather
    from exo.rollouts import experience, scorers
    from exo.runs import inputs as run_inputs
    from exo.training import evaluator, loop
    from exo.training import ppo as training_ppo
    from exo.training import run as training_run
    from exo.training.optimizer import OptimizerSettings

    path = run_inputs.source("data", config.data, "prepare", prepared="prompts.jsonl")
    dataset = data.read(path, purpose="prompts", **config.reading(), **config.mixing())
    accelerator = distributed.make_accelerator(
        **config.accelerator(), training=distributed.Training(**config.parallel())
    )
    distributed.set_seed(config.seed)
    console.log(dataset.summary())
    name = run_inputs.source("model", config.model, "sft", "align", "ppo")
    model, tokenizer = models.load(name, mapped=fsdp.is_requested(config.fsdp))
    dtypes = models.dtypes_of(config.save_dtype, name)
    (dataset,) = render.apply(
        tokenizer, config.chat_template, config.template_kwargs, gather.template_date(start, accelerator), dataset
    )
    usable, dropped = tokenize.usable_prompts(dataset, tokenizer, skip_invalid=config.skip_invalid)
    console.counts(dropped)
    scorer = scorers.load(
        config.reward_model, config.oracle, accelerator, max_length=config.max_length,
        max_prompt_length=config.max_length - config.max_new_tokens, max_tokens_per_batch=config.max_tokens_per_batch,
        chat_template=render.second_model_option(config.chat_template), date=gather.template_date(start, accelerator),
    )  # fmt: skip
    critic, reference = training_ppo.Critic(model), copy.deepcopy(model).eval().requires_grad_(False)
    for part, exact in ((model, []), (critic, [critic.value]), (reference, [])):
        distributed.place(part, accelerator, config.fsdp, exact)
    module = actor_critic(config, model, critic).train(config.dropout)
    collector = experience_collector(config, module, reference, tokenizer, scorer, accelerator)
    prompts = [example.prompt for example in usable]
    console.counts(tokenize.sampled_prompts(prompts, tokenizer, config.max_length - config.max_new_tokens)[1])
    metrics = training_run.begin(start, accelerator, dataset.account(dropped))
    console.log(
        f"{config.max_steps:,} steps of {config.batch_size} completions, the first {config.critic_warmup_steps} for "
        f"the critic alone; scored by {scorer.name}"
    )
    source = experience.RolloutSampler(
        collector, prompts, rollout_size=config.rollout_size, batch_size=config.batch_size, epochs=config.ppo_epochs,
        warmup_steps=config.critic_warmup_steps, seed=config.seed,
    )  # fmt: skip
    finish = partial(fsdp.gather_model, model, accelerator.is_main_process)
    export = partial(
        evaluator.export, directory=Path(config.output_dir), finish=finish, tokenizer=tokenizer, dtypes=dtypes,
        is_main=accelerator.is_main_process,
    )  # fmt: skip
    task = _task(config, module, source, collector.collator, accelerator.mixed_precision, export)
    settings = loop.Settings(OptimizerSettings(**config.optimizer()), **config.loop())
    loop.train(task, settings, accelerator, metrics)
    console.counts(collector.counts)
    return training_run.end(metrics, finish(), tokenizer, accelerator, dtypes=dtypes)


def _task(
    config: Config,
    module: ActorCritic,
    source: experience.RolloutSampler,
    collator: Collator,
    mixed_precision: str,
    export: Callable[[str], None],
) -> Task:
    from exo.rollouts import experience
    from exo.training import loop, ppo

    def after(step: int, last: bool) -> None:
        if config.export_steps and step % config.export_steps == 0:
            export(f"step-{step}")

    return loop.Task(
        module,
        source,
        config.max_steps,
        collator,
        denominator=ppo.count_tokens,
        shown=SHOWN,
        collate=partial(experience.collate, collator=collator),
        rates={module.model: config.learning_rate, module.critic: config.critic_learning_rate},
        first=None if config.dropout else ppo.first_ratio_check(config.temperature, mixed_precision),
        before_update=partial(ppo.reset_actor_steps, config.critic_warmup_steps),
        after=after,
        after_every=(config.export_steps,),
    )


def actor_critic(config: Config, model: Any, critic: Any) -> ActorCritic:
    """Return policy and critic under PPO's loss."""
    from exo.training.ppo import ActorCritic

    return ActorCritic(
        model, critic, temperature=config.temperature, clip_range=config.clip_range,
        clip_range_value=config.clip_range_value, value_coef=config.value_coef,
    )  # fmt: skip


def experience_collector(
    config: Config, module: ActorCritic, reference: Any, tokenizer: Any, scorer: Any, accelerator: Any
) -> experience.ExperienceCollector:
    """Return what samples completions and scores them."""
    from exo.data.collate import Collator
    from exo.rollouts import experience, samples
    from exo.training.ppo import values_function

    collator = Collator(tokenizer.pad_token_id, config.max_tokens_per_batch)
    values = values_function(module.critic, collator, accelerator)
    return experience.ExperienceCollector(
        module.model, reference, tokenizer, scorer, values, accelerator,
        samples.Settings(config.temperature, config.max_new_tokens), config.max_length - config.max_new_tokens,
        config.seed, collator, config.kl_coef, config.gamma, config.lam, Counter(),
    )  # fmt: skip


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
