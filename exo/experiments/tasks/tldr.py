"""Prepare summaries of Reddit posts: human preferences, and posts with the summaries of their authors.

The source is the hub, or a directory with both as files or folders of files: comparisons.* (openai/
summarize_from_feedback, comparisons) and sft.* (UCL-DARK/openai-tldr-filtered, train). Each comparison names its split;
validation is the test part, as in the published scripts.

Left out: comparisons of news, which have no post.
"""

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from exo.cli import console
from exo.data import DataError, read_rows
from exo.experiments.tasks.source import Files, TaskRequest, drop_seen, files_named, lines, subsample

HUB = "openai/summarize_from_feedback"
COMPARISONS, TEXTS = f"{HUB}:comparisons@train+validation", "UCL-DARK/openai-tldr-filtered@train"
_COMPARISON = "a comparison with info (subreddit, title, post), two summaries with a text, choice 0 or 1, and split"
_TEXT = "a post with subreddit, title, post and summary"


class Pair(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


def tldr(request: TaskRequest) -> Files:
    comparisons, texts = _source_paths(request.source)
    counts: Counter[str] = Counter()
    pairs: dict[bool, list[Pair]] = {True: [], False: []}  # by whether the split is train
    for place, row in chain.from_iterable(map(read_rows, comparisons)):
        if pair := _parse_comparison(place, row, counts):
            pairs[row["split"] == "train"].append(pair)
    imitated = [_parse_text(place, row) for place, row in chain.from_iterable(map(read_rows, texts))]
    console.counts(counts)
    train, test = subsample(pairs[True], request), subsample(pairs[False], request)
    imitated = subsample(imitated, request)
    if not (train and test):
        raise DataError(f"{request.source}: expected comparisons of the splits train and valid; one of them has none")
    train_prompts = {pair.prompt for pair in train} | {prompt for prompt, _ in imitated}
    test = drop_seen(test, train_prompts, lambda pair: pair.prompt)
    return {
        "sft.jsonl": lines({"prompt": p, "completion": c} for p, c in imitated),
        "prompts.jsonl": lines({"prompt": p} for p in dict.fromkeys(pair.prompt for pair in train)),
        "test.jsonl": lines({"prompt": pair.prompt, "chosen": pair.chosen} for pair in test),
        "pairs.jsonl": lines(pair._asdict() for pair in train),
    }


def _source_paths(source: str) -> tuple[list[str], list[str]]:
    """Return the paths of the comparisons and of the texts."""
    directory = Path(source)
    if not directory.exists() and source == HUB:
        return [COMPARISONS], [TEXTS]
    comparisons, texts = (_paths_named(directory, name) for name in ("comparisons", "sft"))
    if not (comparisons and texts):
        raise DataError(
            f"{source}: expected {HUB}, or a directory with comparisons.* and sft.* (.jsonl, .json, .gz or .parquet, "
            "or folders of them)"
        )
    return comparisons, texts


def _paths_named(directory: Path, name: str) -> list[str]:
    if (directory / name).is_dir():
        return [str(directory / name)]
    return files_named(directory, name)


def _format_prompt(post: dict[str, Any]) -> str:
    return f"SUBREDDIT: r/{post['subreddit']}\nTITLE: {post['title']}\nPOST: {post['post']}\nTL;DR:"


def _parse_comparison(place: str, row: dict[str, Any], counts: Counter[str]) -> Pair | None:
    """Return the pair of a comparison, or None, which is counted, if it cannot be used."""
    info, summaries, choice = row.get("info"), row.get("summaries"), row.get("choice")
    texts = [s.get("text") for s in summaries if isinstance(s, dict)] if isinstance(summaries, list) else []
    if isinstance(info, dict) and info.get("post") is None and isinstance(info.get("article"), str):
        counts["comparisons skipped: of news, not of a post"] += 1
        return None
    has_post = isinstance(info, dict) and _is_post(info) and isinstance(row.get("split"), str)
    if not (has_post and len(texts) == 2 and all(isinstance(t, str) for t in texts) and choice in (0, 1)):
        raise DataError(f"{place}: expected {_COMPARISON}")
    chosen, rejected = (" " + str(texts[i]).strip() for i in (int(choice), 1 - int(choice)))
    if chosen == rejected or not (chosen.strip() and rejected.strip()):
        counts["comparisons skipped: an empty summary, or two equal ones"] += 1
        return None
    return Pair(_format_prompt(row["info"]), chosen, rejected)


def _parse_text(place: str, row: dict[str, Any]) -> tuple[str, str]:
    if not _is_post(row) or not isinstance(row.get("summary"), str):
        raise DataError(f"{place}: expected {_TEXT}")
    return _format_prompt(row), " " + row["summary"].strip()


def _is_post(row: dict[str, Any]) -> bool:
    return all(isinstance(row.get(key), str) for key in ("subreddit", "title", "post"))
