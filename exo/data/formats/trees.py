"""Files whose rows must be put together before they say anything: OpenAssistant's messages, HelpSteer's responses.

Every entry of `REGROUPED` turns a stream of rows into another one, of rows with a prompt and all that was answered to
it. Each of these knows how many rows of the file it holds, and those that are in none are skipped with a reason, so
that every row is counted once. OpenAssistant's are read into memory.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from exo.data.errors import Malformed, number, string
from exo.data.formats.prompts import parse_speakers

Row = dict[str, Any]
Place = tuple[int, str]
Stream = Iterable[tuple[Place, Row | Malformed]]

_OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
_TOO_FEW = "fewer than two ranked replies"
_NO_PROMPT = "reply to no message of the user"


class Gathered(NamedTuple):
    """Rows of a file as one row, or what is wrong with them, or why they are skipped."""

    content: Row | Malformed | str
    rows: int = 1  # of the file; of trees, messages


Grouped = Generator[tuple[Place, Gathered], None, None]


class Regrouped(NamedTuple):
    name: str
    keys: frozenset[str]
    convert: Callable[[Stream, str], Grouped]  # of the stream and the purpose
    purposes: frozenset[str]
    fits: Callable[[Row], bool] = lambda row: True


def group_rows(stream: Stream, purpose: str) -> tuple[Iterable[tuple[Place, Gathered]], str]:
    """Return the rows put together, and what they were; the same rows and "" if they speak for themselves."""
    rows = iter(stream)
    begun = []
    for item in rows:
        begun.append(item)
        if isinstance(item[1], Malformed):
            continue
        row = item[1]
        for entry in REGROUPED:
            if purpose in entry.purposes and row.keys() >= entry.keys and entry.fits(row):
                return entry.convert(chain(begun, rows), purpose), entry.name
        break
    return ((place, Gathered(row)) for place, row in chain(begun, rows)), ""


def _trees(stream: Stream, purpose: str) -> Grouped:
    """OpenAssistant's export: a tree of messages a row. Every message counts as a row."""
    number = 0
    for (_, blamed), row in stream:
        items = [Gathered(row)] if isinstance(row, Malformed) else (g for _, g in _of_tree(row.get("prompt"), purpose))
        for gathered in items:
            number += gathered.rows
            yield (number, blamed), gathered


def _of_tree(root: Any, purpose: str) -> Iterator[tuple[Any, Gathered]]:
    """Yield (message, what it and the replies used with it are read as), so that every message counts once."""
    waiting: list[tuple[Any, list[Row], str]] = [(root, [], _NO_PROMPT)]
    while waiting:
        node, before, reason = waiting.pop()
        if problem := _problem(node):
            yield node, Gathered(problem)
            if below := _count_below(node):
                yield node, Gathered("below a message that is not used", below)
            continue
        turns = [*before, {"role": _OASST_ROLES[node["role"]], "content": node["text"]}]
        replies = _replies(node)
        reasons = [_NO_PROMPT] * len(replies)
        if node["role"] == "prompter":
            content, reasons = _answered(turns, replies, purpose)
            used = sum(not why for why in reasons)
            yield node, Gathered(content, 1 + used)
        elif reason:
            yield node, Gathered(reason)
        waiting += [(reply, turns, why) for reply, why in zip(replies, reasons, strict=True)][::-1]


def _problem(node: Any) -> Malformed | str:
    """Return what is wrong with a message of a tree, or why it is skipped; "" if it can be used."""
    if not isinstance(node, dict):
        return Malformed("a message of a tree must be an object")
    if node.get("deleted"):
        return "deleted message"
    if node.get("review_result") is False:
        return "message that failed its review"
    try:
        string("text", node.get("text"))
        if string("role", node.get("role")) not in _OASST_ROLES:
            raise Malformed(f"role must be one of {', '.join(_OASST_ROLES)}")
        if node.get("rank") is not None:
            number("rank", node["rank"])
    except Malformed as error:
        return error
    if not isinstance(node.get("replies") or [], list):
        return Malformed("replies must be an array")
    return ""


def _replies(node: Any) -> list[Any]:
    replies = node.get("replies") if isinstance(node, dict) else None
    return replies if isinstance(replies, list) else []


def _count_below(node: Any) -> int:
    count, waiting = 0, _replies(node)
    while waiting:
        count += len(waiting)
        waiting = [reply for above in waiting for reply in _replies(above)]
    return count


def _answered(turns: list[Row], replies: list[Any], purpose: str) -> tuple[Row | str, list[str]]:
    """Return the row of a message of the user or why it is skipped; and why each reply is not used with it, or ""."""
    usable = [not _problem(reply) and reply["role"] == "assistant" for reply in replies]
    answers = [reply for reply, use in zip(replies, usable, strict=True) if use]
    ranked = [reply for reply in answers if reply.get("rank") is not None]
    if purpose == "prompts":
        return {"prompt": turns}, ["reply, and no prompt"] * len(replies)
    if purpose == "texts":
        if not answers:
            return "message without a reply", [_NO_PROMPT] * len(replies)
        best = min(ranked, key=_rank) if ranked else answers[0]
        reasons = ["" if reply is best else "not the best reply" for reply in replies]
        return {"prompt": turns, "completion": best["text"]}, reasons
    unranked = [use and reply.get("rank") is None for reply, use in zip(replies, usable, strict=True)]
    if len(ranked) < 2:
        return _TOO_FEW, ["reply without a rank" if none else _TOO_FEW for none in unranked]
    rewards = [0.0 - _rank(reply) for reply in ranked]
    row = {"prompt": turns, "completions": [reply["text"] for reply in ranked], "rewards": rewards}
    whys = zip(usable, unranked, strict=True)
    return row, ["reply without a rank" if none else "" if use else _NO_PROMPT for use, none in whys]


def _rank(reply: Row) -> float:
    return number("rank", reply["rank"])


def _messages(stream: Stream, purpose: str) -> Grouped:
    """OpenAssistant's table: a message a row, with the id of the one that it answers."""
    nodes: dict[str, Row] = {}
    places: dict[str, Place] = {}
    for place, row in stream:
        name = row if isinstance(row, Malformed) else row.get("message_id")
        if not isinstance(name, str) or isinstance(row, Malformed):
            yield place, Gathered(row if isinstance(row, Malformed) else Malformed("message_id must be a string"))
            continue
        if name in nodes:
            yield place, Gathered(Malformed("message_id appears twice"))
            continue
        nodes[name], places[name] = {**row, "replies": []}, place
    roots, lost = [], []
    for name, node in nodes.items():
        parent = node.get("parent_id")
        if parent is None:
            roots.append(name)
        elif isinstance(parent, str) and parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            lost.append(name)
    counted: set[str] = set()
    for name in roots:
        counted |= _names_of(nodes[name])
        for node, gathered in _of_tree(nodes[name], purpose):
            yield places[node["message_id"]], gathered
    for name in lost:
        counted |= _names_of(nodes[name])
        yield places[name], Gathered(Malformed("parent_id names no message of these data"))
        if below := _count_below(nodes[name]):
            yield places[name], Gathered("below a message that is not used", below)
    for name in (name for name in nodes if name not in counted):
        yield places[name], Gathered(Malformed("parent_id leads back to the message itself"))


def _names_of(root: Row) -> set[str]:
    """Return the ids of a message and of all below it."""
    names, waiting = set[str](), [root]
    while waiting:
        names |= {node["message_id"] for node in waiting}
        waiting = [reply for node in waiting for reply in node["replies"]]
    return names


def _responses(stream: Stream, purpose: str) -> Grouped:
    """HelpSteer: a response a row, those to one prompt one after another; the reward is the helpfulness."""
    place: Place = (0, "")
    responses: list[Row] = []  # to one prompt
    for at, row in stream:
        if isinstance(row, Malformed) or "response" not in row or "helpfulness" not in row:
            malformed = row if isinstance(row, Malformed) else Malformed("a row without response or helpfulness")
            yield at, Gathered(malformed)
            continue
        if responses and row.get("prompt") != responses[0].get("prompt"):
            yield from ((place, gathered) for gathered in _to_one_prompt(responses, purpose))
            responses = []
        place = place if responses else at
        responses.append(row)
    if responses:
        yield from ((place, gathered) for gathered in _to_one_prompt(responses, purpose))


def _to_one_prompt(responses: list[Row], purpose: str) -> Iterator[Gathered]:
    """Yield the responses to a prompt as one row; if only one of them or the prompt is used, the others as skipped."""
    others = len(responses) - 1 if purpose != "comparisons" else 0
    try:
        prompt = parse_speakers(responses[0].get("prompt"))
        completions, rewards = ([row[key] for row in responses] for key in ("response", "helpfulness"))
        whole = {"prompt": prompt, "completions": completions, "rewards": rewards}
        yield Gathered(whole, len(responses) - others)
    except Malformed as error:
        yield Gathered(error, len(responses) - others)
    if others:
        yield Gathered("not the best response" if purpose == "texts" else "response to the same prompt", others)


_HELPSTEER = {"prompt", "response", "helpfulness", "correctness", "coherence", "complexity", "verbosity"}
_ALL = frozenset({"comparisons", "texts", "prompts"})
REGROUPED = (
    Regrouped(
        "OpenAssistant trees of messages", frozenset({"message_tree_id", "prompt"}), _trees, _ALL,
        lambda row: isinstance(row["prompt"], dict) and "replies" in row["prompt"],
    ),
    Regrouped("OpenAssistant messages", frozenset({"message_id", "text", "role", "message_tree_id"}), _messages, _ALL),
    Regrouped("HelpSteer responses", frozenset({"prompt", "response", "helpfulness"}), _responses, _ALL,
              lambda row: row.keys() <= _HELPSTEER),
)  # fmt: skip
KEYS = {*_HELPSTEER, "parent_id", "deleted", "review_result", "rank"}.union(*(entry.keys for entry in REGROUPED))
