"""Row formats of public data sets: two answers and a vote, or several answers with scores.

Ties are skipped. The strength of a preference is not used.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from exo.data.errors import Malformed, Row, number, string
from exo.data.formats.generic import RowFormat, answered, items_have, listed, row_format
from exo.data.formats.messages import Chat, parse_messages
from exo.data.formats.parsed_row import ParsedRow
from exo.data.formats.prompts import parse_speakers
from exo.data.formats.transcripts import as_answers


def _pair(prompt: Any, first: str, second: str, row: Row, better: int | None) -> ParsedRow:
    """Return two answers, the better one first; `better` is 0 or 1, or None for a tie."""
    parsed = answered(prompt, {first: row[first], second: row[second]})
    if better is None:
        return ParsedRow(skip="tie")
    return parsed if better == 0 else parsed._replace(completions=parsed.completions[::-1])


def _choice(name: str, value: Any) -> int:
    if value not in (0, 1):
        raise Malformed(f"{name} must be 0 or 1")
    return int(value)


def _strength(name: str, value: Any) -> int | None:
    """Return the answer that a scale from -3 (the first is much better) to 3 prefers."""
    strength = number(name, value)
    return None if strength == 0 else int(strength > 0)


def _votes(
    name: str,
    keys: str,  # prompt, first answer, second answer, vote
    preferred: Callable[[str, Any], int | None],  # from the vote's column and value to 0, 1 or None
    parse: Callable[[Any], Any] = lambda prompt: prompt,
    unused: str = "",
) -> RowFormat:
    """Return a format of chats with two answers and a vote."""
    prompt, first, second, vote = keys.split()

    def parse_row(row: Row) -> ParsedRow:
        better = preferred(vote, row[vote])
        return _pair(parse(row[prompt]), first, second, row, better)

    return row_format(name, keys, parse_row, is_chat=True, unused=unused)


def _webgpt(row: Row) -> ParsedRow:
    question = row["question"]
    if isinstance(question, dict):
        question = question.get("full_text")
    first, second = (number(key, row[key]) for key in ("score_0", "score_1"))
    better = None if first == second else int(second > first)
    return _pair(string("question.full_text", question), "answer_0", "answer_1", row, better)


def _summaries(row: Row) -> ParsedRow:
    """Build the prompt of the published scripts; a blank and the summary follow. News have no post and are skipped."""
    info, summaries = row["info"], row["summaries"]
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise Malformed("info must be an object and summaries an array of two")
    if info.get("post") is None:
        return ParsedRow(skip="no post (news)")
    parts = [string(f"info.{key}", info.get(key)) for key in ("subreddit", "title", "post")]
    texts = [
        string(f"summaries[{i}].text", item.get("text") if isinstance(item, dict) else None)
        for i, item in enumerate(summaries)
    ]
    better = _choice("choice", row["choice"])
    answers = tuple(f" {text.strip()}" for text in texts)
    prompt = "SUBREDDIT: r/{}\nTITLE: {}\nPOST: {}\nTL;DR:".format(*parts)
    return ParsedRow(prompt, answers if better == 0 else answers[::-1])


def _arena(row: Row) -> ParsedRow:
    winner = row["winner"]
    if winner not in ("model_a", "model_b", "tie", "tie (bothbad)"):
        raise Malformed("winner must be model_a, model_b, tie or tie (bothbad)")
    chats = [parse_messages(key, row[key]) for key in ("conversation_a", "conversation_b")]
    if winner.startswith("tie"):
        return ParsedRow(skip="tie")
    if any(len(chat) < 2 or chat[-1].role != "assistant" for chat in chats) or chats[0][:-1] != chats[1][:-1]:
        return ParsedRow(skip="the conversations differ before their last answer")
    answers: Row = {f"conversation_{x}": [dict(chat[-1])] for x, chat in zip("ab", chats, strict=True)}
    return _pair(Chat(chats[0][:-1]), "conversation_a", "conversation_b", answers, int(winner == "model_b"))


def _nectar(row: Row) -> ParsedRow:
    parsed = listed(parse_speakers(row["prompt"]), "answers", row, "answer", "rank", sign=-1)
    if not isinstance(row["prompt"], str):
        return parsed
    return parsed._replace(completions=as_answers(row["prompt"], parsed.completions))


_has_scores = items_have("answers", "pm_score")
_chats = partial(row_format, is_chat=True)
FORMATS = (
    _votes(
        "HelpSteer2 preferences",
        "prompt response_1 response_2 preference_strength",
        _strength,
        parse_speakers,
        "preference_statement preference_elaboration three_most_similar_preferences all_preferences_unprocessed",
    ),
    _votes(
        "HelpSteer3 preferences",
        "context response1 response2 overall_preference",
        _strength,
        unused="individual_preference",
    ),
    _votes(
        "SHP comments",
        "history human_ref_A human_ref_B labels",
        lambda name, value: 1 - _choice(name, value),  # 1: the first is better
        partial(string, "history"),
    ),
    _votes(
        "PKU-SafeRLHF responses",
        "prompt response_0 response_1 better_response_id",
        _choice,
        unused="response_0_source response_0_severity_level response_0_harm_category response_1_source "
        "response_1_severity_level response_1_harm_category safer_response_id",
    ),
    _chats(
        "WebGPT comparisons",
        "question answer_0 answer_1 score_0 score_1",
        _webgpt,
        unused="quotes_0 quotes_1 tokens_0 tokens_1",
    ),
    row_format("comparisons of summaries", "info summaries choice", _summaries, is_turn=False, unused="note"),
    _chats(
        "Stack Exchange pairs",
        "question response_j response_k",
        lambda row: _pair(row["question"], "response_j", "response_k", row, 0),
    ),
    _chats(
        "Stack Exchange answers with scores",
        "question answers",
        lambda row: listed(row["question"], "answers", row, "text", "pm_score"),
        _has_scores,
    ),
    row_format(
        "Chatbot Arena votes", "conversation_a conversation_b winner", _arena, unused="openai_moderation toxic_chat_tag"
    ),
    _chats(
        "Nectar answers with ranks", "prompt answers", _nectar, lambda row: not _has_scores(row), has_ref_logps=True
    ),
)
