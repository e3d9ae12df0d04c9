"""Prompts for a judge: templates, the choice in an answer, and a cache of answers.

A template is plain text with {prompt}, {a}, {b} and optionally {reference}. It allows ties if it contains "tie" in
double quotes.
"""

import hashlib
import re
from pathlib import Path

from exo.data import DataError
from exo.runs.jsonl import JsonlCache, read_cache

FOLDER = Path(__file__).parent / "templates"
TEMPLATES = ("summary", "dialogue", "instruction")
_PLACE = re.compile(r"\{([a-z_]+)\}")
_PLACES = {"prompt", "a", "b", "reference"}
# [label: [noun]] choice, with nothing after it; markup and quotes are gone by then. A noun needs the label: "Answer B"
# alone may be a heading of the question, repeated.
_CHOICE = re.compile(
    r"(?:[^\W\d][\w ]{0,40}[:：]\s*(?:(?i:summary|response|answer|assistant|option)\s+)?)?(A|B|(?i:tie))"
)
_ASKED = re.compile(r'^([^\W\d][\w ]{0,40}):[^\n]*"A"[^\n]*"B"', re.MULTILINE)  # the line that a template asks for
_MARKUP = re.compile(r"[*_`#\"'“”‘’<>\[\]()]")


class JudgeTemplate:
    """A question to a judge, with places for the texts."""

    def __init__(self, name: str) -> None:
        path = FOLDER / f"{name}.txt" if name in TEMPLATES else Path(name)
        if not path.is_file():
            raise ValueError(f"--template {name}: expected {', '.join(TEMPLATES)}, or a text file; found no such file")
        try:
            self.text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"--template {name}: expected UTF-8 text; save it as UTF-8") from None
        places = set(_PLACE.findall(self.text))
        for needed in ("a", "b"):
            if needed not in places:
                raise ValueError(f"--template {name}: expected a place {{{needed}}} for an answer; found none; add it")
        if unknown := sorted(places - _PLACES):
            raise ValueError(f"--template {name}: unknown place {{{unknown[0]}}}; known: {', '.join(sorted(_PLACES))}")
        self.shows_reference = "reference" in places
        self.ties = '"tie"' in self.text
        self.label = found[-1] if (found := _ASKED.findall(self.text)) else ""
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()

    def fill(self, **texts: str) -> str:
        """Insert the texts in one pass, so that braces inside a text stay."""
        return _PLACE.sub(lambda place: texts[place[1]].strip(), self.text)

    def choice(self, answer: str) -> str | None:
        """Return "A", "B" or "tie"; None if the answer states no choice.

        If the template asks for a labelled line, the last one decides; else the last line that contains only a choice.
        Text in <think> is not part of the answer.
        """
        before, _, answer = answer.rpartition("</think>")
        if not before and "<think>" in answer:
            return None  # thoughts without an end
        lines = [_MARKUP.sub("", line).strip().rstrip(".").rstrip() for line in answer.splitlines()]
        label = re.compile(rf"{re.escape(self.label)}\s*[:：]\s*(.*)", re.IGNORECASE) if self.label else None
        labelled = [i for i, line in enumerate(lines) if label and label.match(line)]
        if labelled:
            lines = lines[labelled[-1] :]
            if lines[0].rstrip(":： ").casefold() != self.label.casefold():
                del lines[1:]  # else the choice is on a line below the label
        for line in reversed(lines):
            found = _CHOICE.fullmatch(line)
            if found and (self.ties or found[1] in "AB"):
                return found[1] if found[1] in "AB" else "tie"
        return None


class AnswerCache(JsonlCache):
    """Answers by the hash of the question. DataError if the file is not such a cache; it is left as it is."""

    def __init__(self, path: Path) -> None:
        if damaged := read_cache(path)[1]:
            raise DataError(f"{path}:{damaged[0]}: not a line of a cache of verdicts; choose another --cache")
        super().__init__(path)

    @staticmethod
    def key(template: JudgeTemplate, url: str, body: bytes) -> str:
        """Two servers may call different models by one name."""
        return hashlib.sha256(f"{template.sha256}{url}\n".encode() + body).hexdigest()
