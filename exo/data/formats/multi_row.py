"""Join rows that are one example together: OpenAssistant's messages, HelpSteer's responses.

Every entry of `MULTI_ROW` converts a stream of rows to one of joined rows, each a prompt with its answers. Every row of
the file is counted once, in a joined row or in a skipped part. OpenAssistant's rows are read into memory.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from exo.data.errors import Malformed, Place, Row, number, string
from exo.data.formats.prompts import parse_speakers

Stream = Iterable[tuple[Place, Row | Malformed]]

_OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
_TOO_FEW = "fewer than two ranked replies"
_NO_PROMPT = "reply to no message of the user"
_BELOW = "below a message that is not used"


class JoinedRow(NamedTuple):
    """Rows of a file as one row, or an error, or the reason to skip them."""

    content: Row | Malformed | str
    rows: int = 1  # of the file; messages, if it has trees


JoinedRows = Generator[tuple[Place, JoinedRow], None, None]


class MultiRowFormat(NamedTuple):
    name: str
    keys: frozenset[str]
    join: Callable[[Stream, str], JoinedRows]  # takes the stream and the purpose
    fits: Callable[[Row], bool] = lambda row: True


def join_rows(stream: Stream, purpose: str) -> tuple[Iterable[tuple[Place, JoinedRow]], str]:
    """Return the joined rows and the name of their format; the same rows and "" if each is an example."""
    rows = iter(stream)
    first_rows = []
    for item in rows:
        first_rows.append(item)
        row = item[1]
        if isinstance(row, Malformed):
            continue
        for entry in MULTI_ROW:
            if purpose in ("comparisons", "texts", "prompts") and row.keys() >= entry.keys and entry.fits(row):
                return entry.join(chain(first_rows, rows), purpose), entry.name
        break
    return ((place, JoinedRow(row)) for place, row in chain(first_rows, rows)), ""


def _join_trees(stream: Stream, purpose: str) -> JoinedRows:
    """Read OpenAssistant's export: a tree of messages a row. Every message counts as a row."""
    count = 0
    for (_, place), row in stream:
        if isinstance(row, Malformed):
            parts = [JoinedRow(row)]
        else:
            parts = [part for _, part in _join_tree(row.get("prompt"), purpose)]
        for part in parts:
            count += part.rows
            yield (count, place), part


def _join_tree(root: Any, purpose: str) -> Iterator[tuple[Any, JoinedRow]]:
    """Yield each message with the row of the message and its replies; every message counts once."""
    stack: list[tuple[Any, list[Row], str]] = [(root, [], _NO_PROMPT)]
    while stack:
        node, earlier_turns, reason = stack.pop()
        if problem := _check_node(node):
            yield node, JoinedRow(problem)
            if below := len(_descendants(node)):
                yield node, JoinedRow(_BELOW, below)
            continue
        turns = [*earlier_turns, {"role": _OASST_ROLES[node["role"]], "content": node["text"]}]
        replies = _replies(node)
        reasons = [_NO_PROMPT] * len(replies)
        if node["role"] == "prompter":
            content, reasons = _join_replies(turns, replies, purpose)
            yield node, JoinedRow(content, 1 + reasons.count(""))
        elif reason:
            yield node, JoinedRow(reason)
        stack += [(reply, turns, why) for reply, why in zip(replies, reasons, strict=True)][::-1]


def _check_node(node: Any) -> Malformed | str:
    """Return the error of a message of a tree, or the reason to skip it, or ""."""
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


def _descendants(node: Any) -> list[Any]:
    nodes = [*_replies(node)]
    for reply in nodes:
        nodes += _replies(reply)
    return nodes


def _join_replies(turns: list[Row], replies: list[Any], purpose: str) -> tuple[Row | str, list[str]]:
    """Return the row of a user's message, or the reason to skip it; and for each reply why the row lacks it, or ""."""
    answers = [reply for reply in replies if not _check_node(reply) and reply["role"] == "assistant"]
    ranked = [reply for reply in answers if reply.get("rank") is not None]
    if purpose == "prompts":
        return {"prompt": turns}, ["reply, and no prompt"] * len(replies)
    if purpose == "texts":
        if not answers:
            return "message without a reply", [_NO_PROMPT] * len(replies)
        best = min(ranked, key=_rank) if ranked else answers[0]
        reasons = ["" if reply is best else "not the best reply" for reply in replies]
        return {"prompt": turns, "completion": best["text"]}, reasons
    is_comparison = len(ranked) > 1
    by_reply = dict.fromkeys(map(id, answers), "reply without a rank")
    by_reply |= dict.fromkeys(map(id, ranked), "" if is_comparison else _TOO_FEW)
    reasons = [by_reply.get(id(reply), _NO_PROMPT if is_comparison else _TOO_FEW) for reply in replies]
    if not is_comparison:
        return _TOO_FEW, reasons
    rewards = [0.0 - _rank(reply) for reply in ranked]
    return {"prompt": turns, "completions": [reply["text"] for reply in ranked], "rewards": rewards}, reasons


def _rank(reply: Row) -> float:
    return number("rank", reply["rank"])


def _join_messages(stream: Stream, purpose: str) -> JoinedRows:
    """Read OpenAssistant's table: a message a row, with the id of the one that it answers."""
    nodes: dict[str, Row] = {}
    places: dict[str, Place] = {}
    for place, row in stream:
        name = None if isinstance(row, Malformed) else row.get("message_id")
        if isinstance(row, Malformed):
            yield place, JoinedRow(row)
        elif not isinstance(name, str):
            yield place, JoinedRow(Malformed("message_id must be a string"))
        elif name in nodes:
            yield place, JoinedRow(Malformed("message_id appears twice"))
        else:
            nodes[name], places[name] = {**row, "replies": []}, place
    roots, orphans = [], []
    for node in nodes.values():
        parent = node.get("parent_id")
        if parent is None:
            roots.append(node)
        elif isinstance(parent, str) and parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            orphans.append(node)
    for root in roots:
        for node, joined in _join_tree(root, purpose):
            yield places[node["message_id"]], joined
    for node in orphans:
        yield places[node["message_id"]], JoinedRow(Malformed("parent_id names no message of these data"))
        if below := len(_descendants(node)):
            yield places[node["message_id"]], JoinedRow(_BELOW, below)
    counted = {node["message_id"] for top in (*roots, *orphans) for node in (top, *_descendants(top))}
    for name in (name for name in nodes if name not in counted):
        yield places[name], JoinedRow(Malformed("parent_id leads back to the message itself"))


def _join_responses(stream: Stream, purpose: str) -> JoinedRows:
    """Read HelpSteer: a response per row, those of a prompt one after another; the reward is the helpfulness."""
    first: Place = (0, "")
    responses: list[Row] = []  # to one prompt
    for place, row in stream:
        if isinstance(row, Malformed):
            yield place, JoinedRow(row)
        elif "response" not in row or "helpfulness" not in row:
            yield place, JoinedRow(Malformed("a row without response or helpfulness"))
        elif responses and row.get("prompt") == responses[0].get("prompt"):
            responses.append(row)
        else:
            yield from ((first, joined) for joined in _join_answers(responses, purpose))
            first, responses = place, [row]
    yield from ((first, joined) for joined in _join_answers(responses, purpose))


def _join_answers(responses: list[Row], purpose: str) -> Iterator[JoinedRow]:
    """Yield the responses to a prompt as one row, and those that the purpose does not use as skipped."""
    if not responses:
        return
    unused = len(responses) - 1 if purpose != "comparisons" else 0
    content: Row | Malformed
    try:
        prompt = parse_speakers(responses[0].get("prompt"))
        completions, rewards = ([row[key] for row in responses] for key in ("response", "helpfulness"))
        content = {"prompt": prompt, "completions": completions, "rewards": rewards}
    except Malformed as error:
        content = error
    yield JoinedRow(content, len(responses) - unused)
    if unused:
        yield JoinedRow("not the best response" if purpose == "texts" else "response to the same prompt", unused)


_HELPSTEER = {"prompt", "response", "helpfulness", "correctness", "coherence", "complexity", "verbosity"}
MULTI_ROW = (
    MultiRowFormat(
        "OpenAssistant trees of messages",
        frozenset({"message_tree_id", "prompt"}),
        _join_trees,
        lambda row: isinstance(row["prompt"], dict) and "replies" in row["prompt"],
    ),
    MultiRowFormat(
        "OpenAssistant messages", frozenset({"message_id", "text", "role", "message_tree_id"}), _join_messages
    ),
    MultiRowFormat(
        "HelpSteer responses",
        frozenset({"prompt", "response", "helpfulness"}),
        _join_responses,
        lambda row: row.keys() <= _HELPSTEER,
    ),
)
KEYS = {*_HELPSTEER, "parent_id", "deleted", "review_result", "rank"}.union(*(entry.keys for entry in MULTI_ROW))
