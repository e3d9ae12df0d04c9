"""Sample K completions per prompt, with their tokens, their log-probs and the reason why each ended.

    python -m exo.sample --model DIR_OR_NAME --data FILE

Each completion has its own random stream, which depends on the seed, the index of its prompt in the file and its index
among the K, so a part of the data (--first, --prompts) gets the same completions as in a run on all of it. --engine
vllm samples with vLLM, if it is installed, from other random streams. Completed batches are cached; run the same
command again to resume a killed run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from exo.cli import console
from exo.cli.fields import MODEL, NOT_NEGATIVE, POSITIVE, TOP_P, at_least, named, option, require
from exo.cli.main import command
from exo.cli.options import ChatOptions, Compute, DataOptions
from exo.runs.stage import Start, stage

if TYPE_CHECKING:
    from exo import data


@dataclass(frozen=True)
class Config(Compute, DataOptions, ChatOptions):
    output_dir: str = option("runs/samples", "directory of the run")
    model: str = option("", "directory or hub name of a causal LM", MODEL)
    data: str = option("", "prompts: any data file that has them", named("a file of prompts"))
    k: int = option(4, "completions per prompt", at_least(1))
    temperature: float = option(1.0, "divides the logits", POSITIVE)
    top_p: float = option(1.0, "draw from the most probable tokens that sum to this probability; 1 means all", TOP_P)
    max_new_tokens: int = option(256, "tokens of a completion, including its end of sequence", at_least(1))
    max_prompt_length: int = option(768, "tokens of a prompt; a longer one is cut on the left", at_least(1))
    batch_size: int = option(256, "completions at a time", at_least(1))
    first: int = option(0, "index of the first prompt to use, from 0", NOT_NEGATIVE)
    prompts: int | None = option(None, "use at most this many prompts", at_least(1))
    epochs: int = option(1, "passes over the prompts, each with new completions", at_least(1))
    engine: Literal["torch", "vllm"] = option("torch", "library to sample with")


@stage("sample", reads=("model", "data"), makes="samples.jsonl")
def run(config: Config, start: Start) -> Path:
    """Sample and return the run directory, which has samples.jsonl."""
    from exo import models
    from exo.data.text import render, tokenize
    from exo.distributed import gather
    from exo.distributed.accelerator import make_accelerator
    from exo.rollouts import samples, shards, vllm
    from exo.runs import inputs as run_inputs

    dataset = read(config)
    console.log(dataset.summary())
    name = run_inputs.source("model", config.model, "sft", "align", "ppo")
    chosen(config, len(dataset.examples))  # fail before the model is loaded
    accelerator = make_accelerator(**config.accelerator())
    if config.engine == "torch":
        model, tokenizer = models.load(name)
        model.to(accelerator.device)
    else:
        tokenizer = models.load_tokenizer(name)
    (rendered,) = render.apply(
        tokenizer, config.chat_template, config.template_kwargs, gather.template_date(start, accelerator), dataset
    )
    usable, dropped = tokenize.usable_prompts(rendered, tokenizer, skip_invalid=config.skip_invalid)
    numbers = chosen(config, len(usable))
    prompts = [usable[number % len(usable)].prompt for number in numbers]
    console.log(f"{len(numbers):,} prompts x {config.k} completions of at most {config.max_new_tokens} tokens")

    settings = samples.Settings(config.temperature, config.max_new_tokens, config.top_p)
    if config.engine == "vllm":
        engine = vllm.Engine(
            name, tokenizer, dtype=config.dtype, seed=config.seed, num_processes=accelerator.num_processes
        )
    cache = shards.begin(start, accelerator, dataset.account(dropped))
    options = config.values("k seed max_prompt_length") | {"numbers": numbers}
    options["run"] = partial(shards.sample_shared, accelerator=accelerator, cache=cache)
    if config.engine == "vllm":
        examples = engine.draw(prompts, settings, **options)
    else:
        options |= {"batch_size": config.batch_size, "label": "completions"}
        with accelerator.autocast():
            examples = samples.draw(model, tokenizer, prompts, settings, **options)
    result = samples.describe(examples)
    console.log(f"  mean {result['mean_tokens']:.1f} tokens")
    samples.log_cut(examples)
    return shards.end(cache, "samples.jsonl", map(samples.to_row, examples), accelerator, result)


def read(config: Config, option: str = "data") -> data.Dataset:
    """Read the prompts of the file that an option names."""
    from exo import data
    from exo.runs import inputs as run_inputs

    path = run_inputs.source(option, getattr(config, option), "prepare", prepared="prompts.jsonl")
    return data.read(path, purpose="prompts", **config.reading_of(option))


def chosen(config: Config, total: int) -> list[int]:
    """Return the numbers of the prompts to use: their indices, plus `total` in each further epoch.

    A completion depends on the number of its prompt, so each epoch draws other completions.
    """
    require(config.first < total, "first", f"less than the {total} prompts of --data", config.first)
    indices = range(total)[config.first :][: config.prompts]
    return [epoch * total + i for epoch in range(config.epochs) for i in indices]


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
