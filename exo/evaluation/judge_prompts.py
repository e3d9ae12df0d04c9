"""Templates of the questions to a judge, the choice in its answers, and a cache of answers.

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
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_PLACEHOLDERS = {"prompt", "a", "b", "reference"}
# [label: [noun]] choice, and nothing after it; markup and quotes are removed first. A noun needs a label, because
# "Answer B" alone may repeat a heading of the question.
_CHOICE = re.compile(
    r"(?:[^\W\d][\w ]{0,40}[:：]\s*(?:(?i:summary|response|answer|assistant|option)\s+)?)?(A|B|(?i:tie))"
)
# The line of a template that asks for a labelled choice.
_LABELLED = re.compile(r'^([^\W\d][\w ]{0,40}):[^\n]*"A"[^\n]*"B"', re.MULTILINE)
_MARKUP = re.compile(r"[*_`#\"'“”‘’<>\[\]()]")


class JudgeTemplate:
    """A question to a judge, with placeholders for the texts."""

    def __init__(self, name: str) -> None:
        path = FOLDER / f"{name}.txt" if name in TEMPLATES else Path(name)
        if not path.is_file():
            raise ValueError(f"--template {name}: expected {', '.join(TEMPLATES)}, or a text file; found no such file")
        try:
            self.text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"--template {name}: expected UTF-8 text; save it as UTF-8") from None
        names = set(_PLACEHOLDER.findall(self.text))
        if missing := sorted({"a", "b"} - names):
            raise ValueError(f"--template {name}: expected {{a}} and {{b}} for the answers; add {{{missing[0]}}}")
        if unknown := sorted(names - _PLACEHOLDERS):
            expected = ", ".join(sorted(_PLACEHOLDERS))
            raise ValueError(f"--template {name}: unknown placeholder {{{unknown[0]}}}; expected some of {expected}")
        self.shows_reference = "reference" in names
        self.ties = '"tie"' in self.text
        self.label = labels[-1] if (labels := _LABELLED.findall(self.text)) else ""
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()

    def fill(self, **texts: str) -> str:
        """Insert the texts in one pass, so that braces inside a text stay."""
        return _PLACEHOLDER.sub(lambda match: texts[match[1]].strip(), self.text)

    def choice(self, answer: str) -> str | None:
        """Return "A", "B" or "tie"; None if the answer states no choice.

        If the template asks for a labelled line, the last one decides; else the last line that contains only a choice.
        Text in <think> is not part of the answer.
        """
        thoughts, _, answer = answer.rpartition("</think>")
        if not thoughts and "<think>" in answer:
            return None  # thoughts without an end
        lines = [_MARKUP.sub("", line).strip().rstrip(".").rstrip() for line in answer.splitlines()]
        label = re.compile(rf"{re.escape(self.label)}\s*[:：]\s*(.*)", re.IGNORECASE) if self.label else None
        labelled = [i for i, line in enumerate(lines) if label and label.match(line)]
        if labelled:
            lines = lines[labelled[-1] :]
            if lines[0].rstrip(":： ").casefold() != self.label.casefold():
                del lines[1:]  # else the choice is on a line below the label
        for line in reversed(lines):
            choice = _CHOICE.fullmatch(line)
            if choice and (self.ties or choice[1] in "AB"):
                return choice[1] if choice[1] in "AB" else "tie"
        return None


class AnswerCache(JsonlCache):
    """Answers by the hash of the question. DataError if the file is something else; it is not changed."""

    def __init__(self, path: Path) -> None:
        if damaged := read_cache(path)[1]:
            raise DataError(f"{path}:{damaged[0]}: not a line of a cache of verdicts; choose another --cache")
        super().__init__(path)

    @staticmethod
    def key(template: JudgeTemplate, url: str, body: bytes) -> str:
        """Return the key of a request. It includes the URL, because servers may use one name for different models."""
        return hashlib.sha256(f"{template.sha256}{url}\n".encode() + body).hexdigest()
