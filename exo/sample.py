"""Sampling: K completions a prompt, with their tokens, log-probs and how each ended.

python -m exo.sample --model DIR_OR_NAME --data FILE. Each completion has a random stream of its own, named by the seed,
the prompt's place in the file and its number among the K: parts of the data (--first, --prompts) agree with the whole.
--engine vllm samples there instead, where it is installed; its streams are its own. Batches are kept as they are drawn,
and a run that was killed draws the others.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from exo import data, models
from exo.cli import console
from exo.cli.fields import MODEL, NOT_NEGATIVE, POSITIVE, TOP_P, at_least, named, option, require
from exo.cli.main import command
from exo.cli.options import ChatOptions, Compute, DataOptions
from exo.data import Example
from exo.data.text import render, tokenize
from exo.distributed import gather
from exo.distributed.accelerator import make_accelerator
from exo.rollouts import generate, samples, shards
from exo.rollouts.generate import Job, Sample
from exo.runs import inputs as run_inputs
from exo.runs.stage import Start, stage

AT_ONCE = 8192  # completions that vLLM is asked for together, and so what a kill may cost
Run = Callable[[Sequence[Job]], list[list[Sample]]]  # of generation.sample
Draw = Callable[[Run], list[Example]]
Prompts = Callable[[Any], tuple[list[int], list[str]]]  # places and prompts, given a tokenizer and its chat template


@dataclass(frozen=True)
class Config(Compute, DataOptions, ChatOptions):
    output_dir: str = option("runs/samples", "directory of the run")
    model: str = option("", "directory or hub name of a causal LM", MODEL)
    data: str = option("", "prompts: any data file that has them", named("a file of prompts"))
    k: int = option(4, "completions a prompt", at_least(1))
    temperature: float = option(1.0, "divides the logits", POSITIVE)
    top_p: float = option(1.0, "draw from the most probable tokens whose probabilities reach it; 1 means all", TOP_P)
    max_new_tokens: int = option(256, "tokens of a completion, its end of sequence included", at_least(1))
    max_prompt_length: int = option(768, "tokens of a prompt; a longer one loses its left", at_least(1))
    batch_size: int = option(256, "completions at a time", at_least(1))
    first: int = option(0, "place of the first prompt to use, counted from 0", NOT_NEGATIVE)
    prompts: int | None = option(None, "use at most so many prompts", at_least(1))
    epochs: int = option(1, "times through the prompts, each with completions of its own", at_least(1))
    engine: Literal["torch", "vllm"] = option("torch", "what samples")


@stage("sample")
def run(config: Config, start: Start) -> Path:
    """Sample and return the run directory, which has samples.jsonl."""
    dataset = read(config)
    console.log(dataset.summary())
    model = run_inputs.source("model", config.model, "sft", "align", "ppo")
    chosen(config, len(dataset.examples))
    accelerator = make_accelerator(config)
    dropped: Counter[str] = Counter()

    def prompts(tokenizer: Any) -> tuple[list[int], list[str]]:
        (rendered,) = render.apply(
            tokenizer, config.chat_template, config.template_kwargs, gather.template_date(start, accelerator), dataset
        )
        usable, more = tokenize.usable_prompts(rendered, tokenizer, skip_invalid=config.skip_invalid)
        dropped.update(more)
        numbers = chosen(config, len(usable))
        console.log(f"{len(numbers):,} prompts x {config.k} completions of at most {config.max_new_tokens} tokens")
        return numbers, [usable[number % len(usable)].prompt for number in numbers]

    draw = {"torch": _torch, "vllm": _vllm}[config.engine](config, model, prompts, accelerator)
    pieces = shards.begin(start, accelerator, dataset.account(dropped))
    examples = draw(partial(shards.sample_shared, accelerator=accelerator, cache=pieces))
    result = samples.describe(examples)
    console.log(f"  mean {result['mean_tokens']:.1f} tokens")
    samples.log_cut(examples)
    return shards.end(pieces, "samples.jsonl", map(samples.to_row, examples), accelerator, result)


def read(config: Config, option: str = "data") -> data.Dataset:
    """Read the file that an option names."""
    path = run_inputs.source(option, getattr(config, option), "prepare", prepared="prompts.jsonl")
    return data.read(path, purpose="prompts", **config.reading_of(option))


def chosen(config: Config, total: int) -> list[int]:
    """Return the places of the prompts. A prompt that comes round again has a new place, and so new completions."""
    require(config.first < total, "first", f"less than the {total} prompts of --data", config.first)
    places = range(config.first, total if config.prompts is None else min(total, config.first + config.prompts))
    return [epoch * total + i for epoch in range(config.epochs) for i in places]


def _torch(config: Config, name: str, prompts_of: Prompts, accelerator: Accelerator) -> Draw:
    model, tokenizer = models.load(name)
    model.to(accelerator.device)
    numbers, prompts = prompts_of(tokenizer)

    def draw(run: Run) -> list[Example]:
        with accelerator.autocast():
            return samples.draw(
                model, tokenizer, prompts, _settings(config), label="completions",
                max_prompt_length=config.max_prompt_length, numbers=numbers, k=config.k, run=run,
                seed=config.seed, batch_size=config.batch_size,
            )  # fmt: skip

    return draw


def _settings(config: Config) -> samples.Settings:
    return samples.Settings(config.temperature, config.max_new_tokens, config.top_p)


def _vllm(config: Config, name: str, prompts_of: Prompts, accelerator: Accelerator) -> Draw:
    """The same from vLLM. Log-probs are those it drew from, so at a top_p below 1 they are not the model's own."""
    if accelerator.num_processes > 1:
        raise ValueError("--engine vllm: expected one process, which sees to its GPUs itself")
    try:
        import vllm
    except ModuleNotFoundError:
        raise ValueError("--engine vllm: not installed; pip install vllm, or leave out --engine") from None
    tokenizer: Any = models.load_tokenizer(name)
    numbers, prompts = prompts_of(tokenizer)
    ids, counts = tokenize.sampled_prompts(prompts, tokenizer, config.max_prompt_length)
    console.counts(counts)
    stop_ids = list(models.stop_ids(name, tokenizer))
    never = dict.fromkeys(models.absent_ids(name, tokenizer), -100.0)
    dtype = "auto" if config.dtype == "auto" else config.dtype
    engine = vllm.LLM(model=name, dtype=dtype, seed=config.seed, logprobs_mode="processed_logprobs")

    def some(part: slice) -> list[Sample]:
        wanted = [
            vllm.SamplingParams(
                n=1, temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_new_tokens, logprobs=0,
                seed=generate.stream_seed(config.seed, number, j), stop_token_ids=stop_ids,
                logit_bias=never or None,
            )
            for number in numbers[part]
            for j in range(config.k)
        ]  # fmt: skip
        outputs = engine.generate([{"prompt_token_ids": row} for row in ids[part] for _ in range(config.k)], wanted)
        return [_from_vllm(output.outputs[0], stop_ids) for output in outputs]

    def draw(run: Run) -> list[Example]:
        each = max(1, AT_ONCE // config.k)
        parts = [slice(i, i + each) for i in range(0, len(ids), each)]
        flat = [found for some_of in run([partial(some, part) for part in parts]) for found in some_of]
        drawn = [flat[i : i + config.k] for i in range(0, len(flat), config.k)]
        return samples.to_examples(prompts, ids, drawn, tokenizer, _settings(config), numbers)

    return draw


def _from_vllm(completion: Any, stop_ids: Sequence[int]) -> Sample:
    ids = tuple(completion.token_ids)
    logprob = sum(at[token].logprob for at, token in zip(completion.logprobs, ids, strict=True))
    return Sample(ids, logprob, "eos" if ids[-1] in stop_ids else "length")


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
