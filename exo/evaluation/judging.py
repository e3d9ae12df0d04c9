"""Ask a judge about pairs of answers, several at a time, through a cache of its answers."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

from exo.cli import console
from exo.evaluation.judge_client import JudgeClient, NoAnswer
from exo.evaluation.judge_prompts import AnswerCache, JudgeTemplate
from exo.evaluation.win_rate import ORDERS, Judged, Judgement, Pair


class Judge(NamedTuple):
    """A template, the model that answers, and its cached answers."""

    template: JudgeTemplate
    client: JudgeClient
    cache: AnswerCache


def judge_pairs(judge: Judge, pairs: Sequence[Pair], concurrency: int) -> tuple[Judged, str]:
    """Return the judgement of each pair in each order, and an error message if the server stopped answering, or "".

    Pairs with the same texts share one request.
    """
    tasks = [(number, order) for number in range(len(pairs)) for order in ORDERS]
    judged: Judged = dict.fromkeys(tasks, Judgement(None, None, "not requested: the server did not answer"))
    by_question: dict[str, list[tuple[int, str]]] = {}
    for number, order in tasks:
        by_question.setdefault(pairs[number].question(judge.template, order), []).append((number, order))
    progress = console.Progress("judgements", len(tasks), every=max(1, len(tasks) // 10))
    pool = ThreadPoolExecutor(concurrency)
    message, failures = "", 0  # failures in a row
    try:
        futures = {pool.submit(_judge, judge, question): tasks for question, tasks in by_question.items()}
        for future in as_completed(futures):
            judgement = future.result()
            judged |= dict.fromkeys(futures[future], judgement)
            progress.advance(len(futures[future]))
            failures = failures + 1 if judgement.answer is None else 0
            if failures == min(max(8, concurrency), len(by_question)):
                message = (
                    f"--endpoint {judge.client.url}: {failures} requests in a row were not answered, last: "
                    f"{judgement.reason}; the answers so far are cached; run the same command again to continue"
                )
                break
    finally:
        judge.client.stop()
        pool.shutdown(cancel_futures=True)
        progress.stop()
    return judged, message


def _judge(judge: Judge, question: str) -> Judgement:
    template, client, cache = judge
    key = cache.key(template, client.url, json.dumps(client.request(question), sort_keys=True).encode())
    if (cached := cache.entries.get(key)) is not None:
        return Judgement(cached, template.choice(cached), cached=True)
    try:
        answer = client.ask(question)
        if not answer.truncated and template.choice(answer.text) is None and client.retries:
            answer = client.ask(question)  # again, because servers are not deterministic even at temperature 0
    except NoAnswer as error:
        return Judgement(None, None, str(error))
    if answer.truncated:  # the rest might have changed the choice
        return Judgement(answer.text, None, "cut off before its end", truncated=True)
    choice = template.choice(answer.text)
    if choice is not None:  # an answer without a choice is not cached, so that the next run asks again
        cache.put(key, answer.text)
    return Judgement(answer.text, choice)
