"""PPO, the paper's baseline: the policy against a reward, held near the reference by a KL penalty on every token.

python -m exo.ppo --model DIR_OR_NAME --data PROMPTS --reward_model DIR, or --oracle module:function. Clipped objective,
a critic of its own with a clipped loss, and at first the critic alone, the actor frozen, as in the paper's appendix C.
The run directory is the model directory; the critic is not kept. Left out: adaptive KL coefficients, entropy bonus.
"""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from exo import data, models
from exo.cli import console
from exo.cli.errors import RunError
from exo.cli.fields import MODEL, NOT_NEGATIVE, POSITIVE, SHARE, at_least, named, option, require
from exo.cli.main import command
from exo.cli.options import ChatOptions, DataOptions, ScorerOptions, Training
from exo.data.collate import Batch, Collator, split_completions
from exo.data.text import render, tokenize
from exo.data.text.tokenize import TokenizedExample
from exo.distributed import fsdp, gather
from exo.distributed.accelerator import Training as DistributedTraining
from exo.distributed.accelerator import make_accelerator, place, set_seed
from exo.models import logps as model_logps
from exo.models.attention import masks
from exo.models.lm_head import LMHead, eval_mode
from exo.rollouts import experience, samples, scorers
from exo.rollouts.experience import Rollout, RolloutBatch
from exo.runs import inputs as run_inputs
from exo.runs.stage import Start, stage
from exo.training import loop
from exo.training import metrics as training_metrics
from exo.training import run as training_run
from exo.training.optimizer import OptimizerSettings
from exo.training.step import LossOutput
from exo_kernels import linear_token_logps

SHOWN = {"score": "score", "kl": "kl", "cut": "cut", "value_loss": "value", "tokens_per_second": "update tok/s"}

ACTOR_GROUPS = 2  # of the optimizer's parameters, its first: matrices and vectors


@dataclass(frozen=True)
class Config(Training, DataOptions, ChatOptions, ScorerOptions):
    output_dir: str = option("runs/ppo", "directory of the run")
    model: str = option("", "directory or hub name of a causal LM, the start and the reference", MODEL)
    data: str = option("", "prompts: any data file that has them", named("a file of prompts"))
    max_steps: int = option(200, "optimizer steps, those of the critic alone among them", at_least(1))
    batch_size: int = option(64, "completions per optimizer step, over all processes", at_least(1))
    rollout_size: int = option(128, "completions sampled at a time", at_least(1))
    ppo_epochs: int = option(2, "passes over them before the next are sampled", at_least(1))
    critic_warmup_steps: int = option(20, "steps at the beginning that train the critic alone", NOT_NEGATIVE)
    critic_learning_rate: float = option(5e-6, "peak learning rate of the critic", POSITIVE)
    kl_coef: float = option(0.1, "reward lost per nat of log pi - log pi_ref", NOT_NEGATIVE)
    temperature: float = option(1.0, "divides the logits", POSITIVE)
    max_new_tokens: int = option(256, "tokens of a completion, its end of sequence included", at_least(1))
    gamma: float = option(1.0, "discount of a token's reward", SHARE)
    lam: float = option(0.95, "GAE's lambda", SHARE)
    clip_range: float = option(0.2, "how far the probability ratio may go", POSITIVE)
    clip_range_value: float = option(
        0.2, "how far a value may go in one update, in units of the reward, once the actor learns", POSITIVE
    )
    value_coef: float = option(0.5, "weight of the critic's loss", NOT_NEGATIVE)
    export_steps: int = option(
        0, "save a loadable model every N steps, in output_dir/models/step-N (0: only at the end)", NOT_NEGATIVE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        still = not (self.critic_warmup_steps and self.weight_decay)
        require(still, "weight_decay", "0 where --critic_warmup_steps freezes the actor: it decays", self.weight_decay)
        require(self.max_length > self.max_new_tokens, "max_length", "more than max_new_tokens", self.max_length)
        learns = self.critic_warmup_steps < self.max_steps
        require(
            learns,
            "critic_warmup_steps",
            f"less than --max_steps {self.max_steps} (0 for short runs)",
            self.critic_warmup_steps,
        )
        whole = self.rollout_size % self.batch_size == 0
        require(whole, "rollout_size", f"a multiple of --batch_size {self.batch_size}", self.rollout_size)


class Critic(nn.Module):
    """The value of the state before each token: a body like the policy's, and a linear head that begins at 0."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body = copy.deepcopy(model.base_model)
        self.value = nn.Linear(model.get_input_embeddings().weight.shape[1], 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, batch: Batch) -> Tensor:  # (n,) float32
        output = self.body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        with torch.autocast(output.last_hidden_state.device.type, enabled=False):  # a value has no 16 bits to spare
            return self.value(output.last_hidden_state.float().flatten(0, 1)[batch.rows])[..., 0]


class ActorCritic(nn.Module):
    """Policy and critic; the forward is PPO's loss of a batch of rollouts."""

    def __init__(self, model: nn.Module, critic: Critic, config: Config) -> None:
        super().__init__()
        self.model, self.critic, self.config = model, critic, config
        self.head = LMHead(model)

    def forward(self, rollout: RolloutBatch, num_tokens: int) -> LossOutput:
        batch, config = rollout.batch, self.config
        logps = linear_token_logps(
            masks.completion_hidden(self.head, batch), self.head.weight, temperature=config.temperature,
            **masks.loss_inputs(batch), **self.head.options,
        )  # fmt: skip
        change = logps.float() - rollout.logps
        actor, clipped = policy_loss(change, rollout.advantages, config.clip_range)
        # the actor's ratios need the critic to move little; while the actor is frozen the critic may go where it must
        clip_range = math.inf if rollout.frozen else config.clip_range_value
        critic = value_loss(self.critic(batch), rollout.values, rollout.returns, clip_range)

        def total(values: Tensor) -> Tensor:
            return values.double().sum()

        # a frozen actor takes part with weight 0, or the processes would wait for its gradient
        loss = (total(actor) * (not rollout.frozen) + config.value_coef * total(critic)) / num_tokens
        n, tokens = len(rollout.scores), len(logps)
        sums: dict[str, tuple[Any, Any]] = {
            "score": (rollout.scores.sum(), n),
            "kl": (rollout.kls.sum(), n),
            "cut": (rollout.cuts.sum(), n),
            "value_loss": (total(critic).detach(), tokens),
            "clip_fraction": (total(clipped), tokens),
            training_metrics.MEAN_SQUARE: (total(change.detach().square()), tokens),
        }
        return LossOutput(loss, sums)


def policy_loss(
    change: Tensor,  # (n,) log pi - log pi_old
    advantages: Tensor,  # (n,)
    clip_range: float,
) -> tuple[Tensor, Tensor]:  # (n,) each
    """Schulman et al. 2017, eq. 7, as a loss; and 1 where the clipping bites."""
    ratio = change.exp()
    plain, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(plain, held), (held > plain).float()


def value_loss(
    values: Tensor,  # (n,)
    before: Tensor,  # (n,) as the critic had them when the rollout was made
    returns: Tensor,  # (n,)
    clip_range: float,
) -> Tensor:  # (n,)
    """Half the squared error, of the value or of the value held near what it was: the larger. Of an infinite range, of
    the value."""
    held = before + (values - before).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (held - returns).square())


@stage("ppo", reads=("model", "data", "reward_model", "oracle"), makes=".")
def run(config: Config, start: Start) -> Path:
    """Train and return the run directory, which is the model directory."""
    path = run_inputs.source("data", config.data, "prepare", prepared="prompts.jsonl")
    dataset = data.read(path, purpose="prompts", **config.reading(), **config.mixing())
    accelerator = make_accelerator(**config.accelerator(), training=DistributedTraining(**config.parallel()))
    set_seed(config.seed)
    console.log(dataset.summary())
    name = run_inputs.source("model", config.model, "sft", "align", "ppo")
    model, tokenizer = models.load(name, mapped=fsdp.is_requested(config.fsdp))
    dtypes = models.dtypes_of(config.save_dtype, name)
    (dataset,) = render.apply(config, tokenizer, gather.template_date(start, accelerator), dataset)
    usable, dropped = tokenize.usable_prompts(dataset, tokenizer, skip_invalid=config.skip_invalid)
    console.counts(dropped)
    scorer = scorers.load(
        config.reward_model, config.oracle, accelerator, max_length=config.max_length,
        max_prompt_length=config.max_length - config.max_new_tokens, max_tokens_per_batch=config.max_tokens_per_batch,
        chat_template=render.of_another_model(config.chat_template), date=gather.template_date(start, accelerator),
    )  # fmt: skip
    critic, reference = Critic(model), copy.deepcopy(model).eval().requires_grad_(False)
    for one, exact in ((model, []), (critic, [critic.value]), (reference, [])):
        place(one, accelerator, config.fsdp, exact)
    module = ActorCritic(model, critic, config).train(config.dropout)
    maker = _maker(config, module, reference, tokenizer, scorer, accelerator)
    prompts = [example.prompt for example in usable]
    console.counts(tokenize.sampled_prompts(prompts, tokenizer, config.max_length - config.max_new_tokens)[1])
    metrics = training_run.begin(start, accelerator, dataset.account(dropped))
    console.log(
        f"{config.max_steps:,} steps of {config.batch_size} completions, the first {config.critic_warmup_steps} for "
        f"the critic alone; scored by {scorer.name}"
    )
    source = experience.RolloutSampler(
        maker, prompts, rollout_size=config.rollout_size,
        batch_size=config.batch_size, epochs=config.ppo_epochs, warmup_steps=config.critic_warmup_steps,
        seed=config.seed,
    )  # fmt: skip

    def after(step: int, last: bool) -> None:
        if config.export_steps and step % config.export_steps == 0:
            finished = fsdp.gather_model(model, accelerator.is_main_process)
            if accelerator.is_main_process:
                models.export_model(finished, tokenizer, Path(config.output_dir), f"step-{step}", dtypes)

    task = loop.Task(
        module,
        source,
        config.max_steps,
        maker.collator,
        denominator=_tokens,
        shown=SHOWN,
        collate=partial(experience.collate, collator=maker.collator),
        rates={model: config.learning_rate, module.critic: config.critic_learning_rate},
        first=partial(_check_ratio, config, accelerator),
        before_update=partial(_rest, config),
        after=after,
        after_every=(config.export_steps,),
    )
    settings = loop.Settings(OptimizerSettings(**config.optimizer()), **config.loop())
    loop.train(task, settings, accelerator, metrics)
    console.counts(maker.counts)
    finished = fsdp.gather_model(model, accelerator.is_main_process)
    return training_run.end(metrics, finished, tokenizer, accelerator, dtypes=dtypes)


def _maker(
    config: Config,
    module: ActorCritic,
    reference: Any,
    tokenizer: Any,
    scorer: scorers.Scorer,
    accelerator: Accelerator,
) -> experience.ExperienceCollector:
    collator = Collator(tokenizer.pad_token_id, config.max_tokens_per_batch)

    @torch.no_grad()
    def values(part: Sequence[TokenizedExample]) -> list[list[float]]:
        batch = collator.collate(part).to(accelerator.device)
        with eval_mode(module.critic), accelerator.autocast():  # targets do not drop out
            rows = fsdp.run_unsharded_root(module.critic, partial(module.critic, batch))
        return [row.tolist() for (row,) in split_completions(part, rows.double().cpu())]

    return experience.ExperienceCollector(
        module.model, reference, tokenizer, scorer, values, accelerator,
        samples.Settings(config.temperature, config.max_new_tokens), config.max_length - config.max_new_tokens,
        config.seed, collator, config.kl_coef, config.gamma, config.lam, Counter(),
    )  # fmt: skip


def _rest(config: Config, step: int, optimizer: torch.optim.Optimizer) -> None:
    """Set the actor's step counters in Adam to 0 until it learns, or its first updates would be too small.

    Its gradients are 0 until then, and so are their averages, but Adam counts the steps that correct their bias.
    """
    if step <= config.critic_warmup_steps + 1:
        for group in optimizer.param_groups[:ACTOR_GROUPS]:
            for parameter in group["params"]:
                if "step" in (state := optimizer.state.get(parameter, {})):
                    state["step"].zero_()


def _tokens(examples: Sequence[Rollout]) -> int:
    return sum(len(example.completions[0]) for example in examples)


def _check_ratio(config: Config, accelerator: Accelerator, loss: float, values: Mapping[str, float]) -> None:
    """Before the first update the policy is the one that sampled: their log-probs differ by rounding alone."""
    square, most = (
        values[training_metrics.MEAN_SQUARE],
        model_logps.TOKEN_NOISE[accelerator.mixed_precision] / config.temperature,
    )
    if not config.dropout and not square <= (6 * most) ** 2:
        raise RunError(
            f"the first update is off policy: log-probs of its tokens differ by {square**0.5:.2g} nats rms, and "
            f"{6 * most:.2g} is the most that rounding does: a wrong mask, temperature or dropout"
        )


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
