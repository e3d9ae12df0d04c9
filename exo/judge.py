"""Compute the win rate of one system over another with a chat model that compares their answers in pairs.

    python -m exo.judge --a FILE --b FILE --template summary --endpoint http://host:port/v1 --model NAME

The protocol is the paper's: 100 prompts, one completion each, judged twice with the answers swapped. The judge's
answers are cached beside the run, so that they survive a crash, --overwrite_output_dir and a change of --limit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo.cli import console
from exo.cli.errors import RunError
from exo.cli.fields import NOT_NEGATIVE, POSITIVE, at_least, named, option, require
from exo.cli.main import command
from exo.cli.options import Stage
from exo.runs.stage import Start, stage

KEY_VARIABLE = "OPENAI_API_KEY"
TEMPLATES, PLACEHOLDERS = "summary, dialogue, instruction", "{prompt}, {a}, {b}, {reference}"


@dataclass(frozen=True)
class Config(Stage):
    output_dir: str = option("runs/judge", "directory of the run")
    a: str = option(
        "",
        "answers of the system to judge: samples, texts or preferences (their chosen)",
        named("a file of answers"),
    )
    b: str = option("", "answers of the system to compare with", named("a file of answers"))
    references: str | None = option(
        None, 'reference texts, for a template that shows them; "category" in a row gives a win rate by category'
    )
    template: str = option("", f"{TEMPLATES}, or a text file with {PLACEHOLDERS}", named(f"{TEMPLATES}, or a file"))
    endpoint: str = option("", "an OpenAI-compatible server, as http://host:port/v1")
    model: str = option("", "the judge's name on that server", named("the judge's name on the server"))
    api_key_env: str = option(KEY_VARIABLE, "environment variable with the API key; no key is sent if it is not set")
    limit: int | None = option(100, "number of prompts, chosen by seed; none means all", at_least(1))
    samples_per_prompt: int = option(1, "pairs of completions per prompt, chosen by seed", at_least(1))
    concurrency: int = option(8, "requests at a time", at_least(1))
    retries: int = option(5, "retries of a request after a temporary failure", NOT_NEGATIVE)
    timeout: float = option(120.0, "seconds to wait for the server", POSITIVE)
    max_tokens: int | None = option(512, "maximum tokens of an answer; none leaves it to the server", at_least(1))
    judge_options: str | None = option(
        None, 'request parameters as JSON: {"reasoning_effort": "low"}; null removes a default: {"temperature": null}'
    )
    cache: str | None = option(None, "file that caches answers; none means judge-cache.jsonl beside output_dir")

    def __post_init__(self) -> None:
        from exo.evaluation import judge_client

        super().__post_init__()
        judge_client.check(self.endpoint)
        judge_client.parse_options(self.judge_options)
        inside = Path(self.cache_path).resolve().is_relative_to(Path(self.output_dir).resolve())
        require(not inside, "cache", "a file outside --output_dir, which --overwrite_output_dir removes", self.cache)

    @property
    def cache_path(self) -> str:
        return self.cache or str(Path(self.output_dir).parent / "judge-cache.jsonl")


@stage("judge", reads=("a", "b", "references", "template"), makes="judge.json")
def run(config: Config, start: Start) -> Path:
    """Judge and return the run directory."""
    from exo import data
    from exo.evaluation import answers, judge_client, win_rate
    from exo.evaluation.judge_prompts import AnswerCache, JudgeTemplate
    from exo.evaluation.judging import Judge, judge_pairs
    from exo.runs import stage as run_stage
    from exo.runs.atomic import atomic_file, write_json

    template = JudgeTemplate(config.template)
    if template.shows_reference and not config.references:
        raise ValueError(f"--references: expected a file, since the template {config.template} shows a reference")
    key = judge_client.read_key(config.api_key_env, KEY_VARIABLE)
    config = dataclasses.replace(config, a=answers.source("a", config.a), b=answers.source("b", config.b))
    pairs = answers.pairs(**config.values("a b references limit seed"), per_prompt=config.samples_per_prompt)
    request_options = judge_client.parse_options(config.judge_options)
    client = judge_client.JudgeClient(
        **config.values("endpoint model retries timeout max_tokens"), key=key, options=request_options
    )
    cache = AnswerCache(Path(config.cache_path))
    try:
        directory = run_stage.begin(start)
        judged, server_error = judge_pairs(Judge(template, client, cache), pairs, config.concurrency)
    finally:
        cache.close()
    with atomic_file(directory / "verdicts.jsonl") as file:
        data.write_jsonl(file, win_rate.rows(pairs, judged))
    result = config.values("a b references template model")
    result |= {"template_sha256": template.sha256} | win_rate.count(pairs, judged, config.seed)
    write_json(directory / "judge.json", result)
    if server_error:
        raise RunError(server_error)
    if result["win_rate"] is None:
        undecided = result["undecided"]
        raise RunError(
            f"{directory}: no pair was decided in both orders: {undecided['unanswered']:,} requests without an answer "
            f"and {undecided['unreadable']:,} answers without the choice that the template asks for"
            f"{_truncated(result)}; see verdicts.jsonl"
        )
    _log(result, directory)
    run_stage.finish(directory, win_rate=result["win_rate"])
    return directory


def _truncated(result: dict[str, Any]) -> str:
    """Return the number of answers that were cut off, and the fix, for a message."""
    return f" ({result['truncated']:,} of them cut off: raise --max_tokens)" if result["truncated"] else ""


def _log(result: dict[str, Any], directory: Path) -> None:
    def percent(rate: dict[str, float]) -> str:
        return "{mean:.1%} [{low:.1%}, {high:.1%}] on {prompts:,} prompts".format(**rate)

    console.log(f"\n{result['a']}\n  against {result['b']}, judged by {result['model']}")
    console.log(f"win rate {percent(result['win_rate'])} (95% interval)")
    console.log(f"{result['wins']:,} won, {result['ties']:,} tied, {result['losses']:,} lost")
    for name, rate in result["by_category"].items():
        console.log(f"  {name}: {percent(rate)}")
    share = result["first_position_share"]
    first = "" if share is None else f"; the first answer won {share:.1%} of the judgements without a tie"
    console.log(f"same position preferred in both orders: {result['position_bias_rate']:.1%} of the pairs{first}")
    if result["cached"]:
        console.log(f"{result['cached']:,} answers are cached from an earlier run")
    if result["identical"]:
        console.log(f"{result['identical']:,} pairs have two identical answers")
    undecided = result["undecided"]
    if undecided["pairs_left_out"]:
        console.log(
            f"left out: {undecided['pairs_left_out']:,} pairs, for {undecided['unanswered']:,} requests without an "
            f"answer and {undecided['unreadable']:,} answers without a choice{_truncated(result)}; "
            "run again with --overwrite_output_dir to ask for them"
        )
    console.log(f"{directory / 'judge.json'}")


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
