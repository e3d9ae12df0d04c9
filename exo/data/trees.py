"""Files whose rows must be put together before they say anything: OpenAssistant's messages, HelpSteer's responses.

Every entry of `REGROUPED` turns a stream of rows into another one, of rows with a prompt and all that was answered to
it. They are read into memory, but for HelpSteer's.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from exo.data.errors import Malformed, number, string
from exo.data.prompts import parse_speakers

Row = dict[str, Any]
Place = tuple[int, str]
Stream = Iterable[tuple[Place, Row | Malformed]]
Rows = Generator[tuple[Place, Row | Malformed], None, None]

_OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


class Regrouped(NamedTuple):
    name: str
    keys: frozenset[str]
    convert: Callable[[Stream, str], Rows]  # of the stream and the purpose
    purposes: frozenset[str]
    fits: Callable[[Row], bool] = lambda row: True


def group_rows(stream: Stream, purpose: str) -> tuple[Stream, str]:
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
    return chain(begun, rows), ""


def _trees(stream: Stream, purpose: str) -> Rows:
    """OpenAssistant's export: a tree of messages a row."""
    for place, row in stream:
        if isinstance(row, Malformed):
            yield place, row
            continue
        try:
            yield from ((place, found) for found in _of_node(row["prompt"], [], purpose))
        except Malformed as error:
            yield place, error
        except RecursionError:
            yield place, Malformed("a tree of messages that is nested too deeply")


def _of_node(node: Any, before: list[Row], purpose: str) -> Iterator[Row]:
    """A row for each message of the user that has usable replies, this one and those below."""
    said = _said(node)
    if said is None:
        return
    turns = [*before, said]
    replies = node.get("replies") or []
    if not isinstance(replies, list):
        raise Malformed("replies must be an array")
    if said["role"] == "user":
        yield from _answered(turns, replies, purpose)
    for reply in replies:
        yield from _of_node(reply, turns, purpose)


def _said(node: Any) -> Row | None:
    """The message of a node; None if it was deleted or failed its review."""
    if not isinstance(node, dict):
        raise Malformed("a message of a tree must be an object")
    if node.get("deleted") or node.get("review_result") is False:
        return None
    role = string("role", node.get("role"))
    if role not in _OASST_ROLES:
        raise Malformed(f"role must be one of {', '.join(_OASST_ROLES)}")
    return {"role": _OASST_ROLES[role], "content": string("text", node.get("text"))}


def _answered(turns: list[Row], replies: list[Any], purpose: str) -> Iterator[Row]:
    kept = [reply for reply in replies if _said(reply) is not None]
    ranked = [reply for reply in kept if reply.get("rank") is not None]
    if purpose == "prompts":
        yield {"prompt": turns}
    elif purpose == "texts" and kept:
        best = min(ranked, key=_rank) if ranked else kept[0]
        yield {"prompt": turns, "completion": best["text"]}
    elif purpose == "comparisons" and len(ranked) > 1:
        rewards = [0.0 - _rank(reply) for reply in ranked]
        yield {"prompt": turns, "completions": [reply["text"] for reply in ranked], "rewards": rewards}


def _rank(reply: Row) -> float:
    return number("rank", reply["rank"])


def _messages(stream: Stream, purpose: str) -> Rows:
    """OpenAssistant's table: a message a row, with the id of the one that it answers."""
    nodes: dict[str, Row] = {}
    places: dict[str, Place] = {}
    for place, row in stream:
        name = row if isinstance(row, Malformed) else row.get("message_id")
        if not isinstance(name, str) or isinstance(row, Malformed):
            yield place, row if isinstance(row, Malformed) else Malformed("message_id must be a string")
            continue
        if name in nodes:
            yield place, Malformed("message_id appears twice")
            continue
        nodes[name], places[name] = {**row, "replies": []}, place
    roots = []
    for name, node in nodes.items():
        parent = node.get("parent_id")
        if parent is None:
            roots.append(name)
        elif isinstance(parent, str) and parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            yield places[name], Malformed("parent_id names no message of these data")
    for name in roots:
        yield from _trees([(places[name], {"prompt": nodes[name]})], purpose)


def _responses(stream: Stream, purpose: str) -> Rows:
    """HelpSteer: a response a row, those to one prompt one after another; the reward is the helpfulness."""
    place, whole = (0, ""), Row()
    for at, row in stream:
        if isinstance(row, Malformed) or "response" not in row or "helpfulness" not in row:
            yield at, row if isinstance(row, Malformed) else Malformed("a row without response or helpfulness")
            continue
        if whole and row.get("prompt") == whole["said"]:
            whole["completions"].append(row["response"])
            whole["rewards"].append(row["helpfulness"])
            continue
        if whole:
            yield place, _finished(whole)
        place, said = at, row.get("prompt")
        whole = {"said": said, "completions": [row["response"]], "rewards": [row["helpfulness"]]}
    if whole:
        yield place, _finished(whole)


def _finished(whole: Row) -> Row | Malformed:
    try:
        return {"prompt": parse_speakers(whole["said"])} | {key: whole[key] for key in ("completions", "rewards")}
    except Malformed as error:
        return error


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
