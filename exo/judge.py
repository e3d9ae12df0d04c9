"""Win rate of one system over another, by a chat model that compares their answers in pairs.

python -m exo.judge --a FILE --b FILE --template summary --endpoint http://host:port/v1 --model NAME. The protocol
is the paper's: 100 prompts, one completion each, judged twice with the answers swapped. Answers are cached beside the
run, so that what was paid for survives a crash, --overwrite_output_dir and a change of --limit. Left out: batch
endpoints, and judges that are no chat model.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo import data
from exo.cli import console
from exo.cli.errors import RunError
from exo.cli.fields import NOT_NEGATIVE, POSITIVE, at_least, named, option, require
from exo.cli.main import command
from exo.cli.options import Stage
from exo.evaluation import answers as evaluation_answers
from exo.evaluation import judge_client, win_rate
from exo.evaluation.judge_client import JudgeClient, NoAnswer
from exo.evaluation.judge_prompts import TEMPLATES, AnswerCache, JudgeTemplate
from exo.evaluation.win_rate import ORDERS, Judged, Judgement, Pair
from exo.runs import stage as run_stage
from exo.runs.atomic import atomic_file, write_json
from exo.runs.stage import Start, stage

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Config(Stage):
    output_dir: str = option("runs/judge", "directory of the run")
    a: str = option(
        "",
        "answers of the system whose win rate is wanted: samples, texts or preferences (their chosen)",
        named("a file of answers"),
    )
    b: str = option("", "answers of the system it is compared with", named("a file of answers"))
    references: str | None = option(
        None, 'texts to judge by, for a template that shows them; "category" in a row gives a win rate by category'
    )
    template: str = option(
        "",
        f"{', '.join(TEMPLATES)}, or a text file with {{prompt}}, {{a}}, {{b}}, {{reference}}",
        named(f"{', '.join(TEMPLATES)}, or a file"),
    )
    endpoint: str = option("", "an OpenAI-compatible server, as http://host:port/v1")
    model: str = option("", "the judge's name on that server", named("the judge's name on the server"))
    api_key_env: str = option(KEY_VARIABLE, "environment variable that holds the key, which is sent if it is set")
    limit: int | None = option(100, "prompts, chosen by seed; none means all", at_least(1))
    samples_per_prompt: int = option(1, "pairs of completions a prompt, chosen by seed", at_least(1))
    concurrency: int = option(8, "requests at a time", at_least(1))
    retries: int = option(5, "more tries of a request that failed for a reason that may pass", NOT_NEGATIVE)
    timeout: float = option(120.0, "seconds that the server may be silent", POSITIVE)
    max_tokens: int | None = option(512, "most tokens of an answer; none leaves it to the server", at_least(1))
    judge_options: str | None = option(
        None,
        'more of each request, as JSON: {"reasoning_effort": "low"}; null takes a default out: {"temperature": null}',
    )
    cache: str | None = option(None, "file of answers so far; none is judge-cache.jsonl beside output_dir")

    def __post_init__(self) -> None:
        super().__post_init__()
        judge_client.check(self.endpoint)
        judge_client.options_from(self.judge_options)
        inside = Path(self.cache_path).resolve().is_relative_to(Path(self.output_dir).resolve())
        require(not inside, "cache", "a file outside --output_dir, which may be removed", self.cache)

    @property
    def cache_path(self) -> str:
        return self.cache or str(Path(self.output_dir).parent / "judge-cache.jsonl")


@stage("judge", reads=("a", "b", "references", "template"), makes="judge.json")
def run(config: Config, start: Start) -> Path:
    """Judge and return the run directory."""
    template = JudgeTemplate(config.template)
    if template.shows_reference and not config.references:
        raise ValueError(f"--references: expected a file, since the template {config.template} shows a reference")
    key = judge_client.key_from(config.api_key_env, KEY_VARIABLE)
    config = dataclasses.replace(
        config, a=evaluation_answers.source("a", config.a), b=evaluation_answers.source("b", config.b)
    )
    pairs = _pairs(config)
    chat = JudgeClient(
        config.endpoint, config.model, key,
        retries=config.retries, timeout=config.timeout, max_tokens=config.max_tokens,
        options=judge_client.options_from(config.judge_options),
    )  # fmt: skip
    cache = AnswerCache(Path(config.cache_path))
    try:
        directory = run_stage.begin(start)
        judged, down = _judge_all(config, template, pairs, chat, cache)
    finally:
        cache.close()
    with atomic_file(directory / "verdicts.jsonl") as file:
        data.write_jsonl(file, win_rate.rows(pairs, judged))
    counted = win_rate.count(pairs, judged, config.seed)
    named = {name: getattr(config, name) for name in ("a", "b", "references", "template", "model")}
    result = named | {"template_sha256": template.sha256} | counted
    write_json(directory / "judge.json", result)
    if down:
        raise RunError(down)
    if result["win_rate"] is None:
        lost = result["undecided"]
        raise RunError(
            f"{directory}: no pair was decided in both orders: {lost['unanswered']:,} requests without an answer and "
            f"{lost['unreadable']:,} answers without a choice, for which the template asks{_cut(result)}; "
            "verdicts.jsonl has them"
        )
    _show(result, directory)
    run_stage.finish(directory, win_rate=result["win_rate"])
    return directory


def _pairs(config: Config) -> list[Pair]:
    files = {"a": evaluation_answers.read(config.a), "b": evaluation_answers.read(config.b)}
    references, categories = evaluation_answers.read_references(config.references) if config.references else ({}, {})
    with_references = files | ({"references": references} if references else {})
    pairs = []
    for number, key in enumerate(evaluation_answers.shared(with_references, config.limit, config.seed)):
        chosen = {
            name: evaluation_answers.choose(
                answers, key, config.samples_per_prompt, seed=config.seed, name=getattr(config, name)
            )
            for name, answers in files.items()
        }
        reference = references[key].completions[0] if references else ""
        for sample, (a, b) in enumerate(zip(chosen["a"], chosen["b"], strict=True)):
            texts = {"prompt": key[0], "a": a, "b": b, "reference": reference}
            pairs.append(Pair(number, files["a"][key].line, sample, categories.get(key, ""), texts))
    return pairs


def _judge_all(
    config: Config, template: JudgeTemplate, pairs: Sequence[Pair], chat: JudgeClient, cache: AnswerCache
) -> tuple[Judged, str]:
    """By pair and order; and what to say where the server answered nothing for too long, or ""."""
    tasks = [(number, order) for number in range(len(pairs)) for order in ORDERS]
    progress = console.Progress("judgements", len(tasks), every=max(1, len(tasks) // 10))
    judged: Judged = dict.fromkeys(tasks, Judgement(None, None, "not asked: the server was silent"))
    down = ""
    silent, patience = 0, max(8, config.concurrency)
    pool = ThreadPoolExecutor(config.concurrency)
    questions: dict[str, list[tuple[int, str]]] = {}  # pairs may be alike; each question is asked once
    for number, order in tasks:
        questions.setdefault(pairs[number].question(template, order), []).append((number, order))
    try:
        futures = {
            pool.submit(_judge, template, chat, cache, question, config.retries): alike
            for question, alike in questions.items()
        }
        for future in as_completed(futures):
            judgement = future.result()
            judged |= dict.fromkeys(futures[future], judgement)
            progress.advance(len(futures[future]))
            silent = silent + 1 if judgement.answer is None else 0
            if silent == min(patience, len(questions)):
                down = (
                    f"--endpoint {config.endpoint}: {silent} requests in a row were not answered, last: "
                    f"{judgement.reason}; answers so far are kept: the same command goes on"
                )
                break
    finally:
        chat.stop()
        pool.shutdown(cancel_futures=True)
        progress.stop()
    return judged, down


def _judge(template: JudgeTemplate, chat: JudgeClient, cache: AnswerCache, question: str, retries: int) -> Judgement:
    body = chat.body(question)
    key = cache.key(template, chat.url, body)
    if (known := cache.entries.get(key)) is not None:
        return Judgement(known, template.choice(known), cached=True)
    try:
        answer = chat.ask(body)
        if not answer.cut and template.choice(answer.text) is None and retries:
            answer = chat.ask(body)  # once more: servers are not exact even at temperature 0
    except NoAnswer as error:
        return Judgement(None, None, str(error))
    if answer.cut:  # what it says so far may not be what it would have said
        return Judgement(answer.text, None, "cut off before its end", truncated=True)
    choice = template.choice(answer.text)
    if choice is not None:  # what decides nothing is to be asked again
        cache.put(key, answer.text)
    return Judgement(answer.text, choice)


def _cut(result: dict[str, Any]) -> str:
    """How many answers were cut off, and what to do."""
    return f" ({result['truncated']:,} of them cut off: raise --max_tokens)" if result["truncated"] else ""


def _show(result: dict[str, Any], directory: Path) -> None:
    def percent(rate: dict[str, float]) -> str:
        return f"{rate['mean']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}] on {rate['prompts']:,} prompts"

    console.log(f"\n{result['a']}\n  against {result['b']}, judged by {result['model']}")
    console.log(f"win rate {percent(result['win_rate'])} (95% interval)")
    console.log(f"{result['wins']:,} won, {result['ties']:,} tied, {result['losses']:,} lost")
    for name, rate in result["by_category"].items():
        console.log(f"  {name}: {percent(rate)}")
    share = result["first_position_share"]
    first = "" if share is None else f"; the first answer won {share:.1%} of the judgements without a tie"
    console.log(f"same position preferred in both orders: {result['position_bias_rate']:.1%} of the pairs{first}")
    if result["cached"]:
        console.log(f"{result['cached']:,} answers were not asked for again; they are those of an earlier run")
    if result["identical"]:
        console.log(f"{result['identical']:,} pairs are of two identical answers")
    lost = result["undecided"]
    if lost["pairs_left_out"]:
        console.log(
            f"left out: {lost['pairs_left_out']:,} pairs, for {lost['unanswered']:,} requests without an answer and "
            f"{lost['unreadable']:,} answers without a choice{_cut(result)}; "
            "run again with --overwrite_output_dir to ask for the missing answers"
        )
    console.log(f"{directory / 'judge.json'}")


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
