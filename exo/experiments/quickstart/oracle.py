"""Score the sentiment of a review of the quickstart, in log-odds, by rules.

A text is worth the sum of its claims. A claim is a subject with a verdict, in one of two forms,

    <subject> was|seemed|felt [not] [adverb] <adjective>       up to a comma, full stop, "and" or "but"
    i|we [would|did] [not] [adverb] <verb> it

and is worth the weight of its adjective or verb, times that of the adverb, times -0.75 after a negation. Only the first
claim of a subject counts, and only the first use of a word, so repetition adds nothing. Words outside a claim count
nothing, so a list of praising words earns nothing. The sum is squashed into (-6, 6): one more superlative in a glowing
review changes it little.
"""

import math
import re
from typing import NamedTuple

BOUND = 6.0
NEGATED = -0.75

ADVERBS = {
    **dict.fromkeys(("very", "really", "truly", "gladly"), 1.5),
    **dict.fromkeys(("quite", "rather", "fairly"), 0.8),
    "slightly": 0.5,
}

ADJECTIVES = {
    **dict.fromkeys(("excellent", "wonderful", "superb", "brilliant", "delicious"), 2.0),
    **dict.fromkeys(("great", "lovely", "charming", "delightful", "impressive"), 1.5),
    **dict.fromkeys(("gripping", "moving", "witty", "inviting", "tasty"), 1.5),
    **dict.fromkeys(("good", "nice", "pleasant", "solid", "decent"), 1.0),
    **dict.fromkeys(("funny", "clever", "clean", "cosy", "bright", "fresh", "generous"), 1.0),
    **dict.fromkeys(("bad", "poor", "weak", "dull", "sloppy", "mediocre"), -1.0),
    **dict.fromkeys(("wooden", "predictable", "shallow", "confusing"), -1.0),
    **dict.fromkeys(("noisy", "cramped", "greasy", "bland"), -1.0),
    **dict.fromkeys(("disappointing", "annoying", "tedious", "dirty", "stale", "shabby"), -1.5),
    **dict.fromkeys(("awful", "terrible", "horrible", "dreadful"), -2.0),
}

VERBS = {
    **dict.fromkeys(("loved", "love"), 2.0),
    **dict.fromkeys(("enjoyed", "enjoy", "recommend"), 1.5),
    **dict.fromkeys(("liked", "like"), 1.0),
    **dict.fromkeys(("disliked", "dislike"), -1.0),
    **dict.fromkeys(("regretted", "regret", "avoid"), -1.5),
    **dict.fromkeys(("hated", "hate"), -2.0),
}


def _one_of(words: dict[str, float]) -> str:
    return f"(?:{'|'.join(words)})"


_MODIFIERS = rf"(?P<negation>(?:not|never) )?(?:(?P<adverb>{_one_of(ADVERBS)}) )?"
_FORMS = (
    re.compile(
        rf"(?P<subject>^|\S+ )(?:was|seemed|felt) {_MODIFIERS}(?P<word>{_one_of(ADJECTIVES)})"
        r"(?= [.,]| and | but |$)"
    ),
    re.compile(rf"\b(?P<subject>(?:i|we) )(?:would |did )?{_MODIFIERS}(?P<word>{_one_of(VERBS)}) it(?= |$)"),
)


class Claim(NamedTuple):
    """A claim of a text, and its weight in the sum, in log-odds."""

    words: str
    weight: float


def score(text: str) -> float:
    """Return the sentiment of a text in log-odds, between -6 and 6; 0 for a text without claims."""
    return BOUND * math.tanh(sum(claim.weight for claim in explain(text)) / BOUND)


def reward(prompt: str, continuation: str) -> float:
    """Return the sentiment of a review in log-odds."""
    return score(f"{prompt} {continuation}")


def explain(text: str) -> list[Claim]:
    """Return the claims that count, in the order of the text."""
    text = " ".join(text.lower().split())
    matches = sorted((m for form in _FORMS for m in form.finditer(text)), key=lambda m: m.start())
    claims: list[Claim] = []
    seen: set[str] = set()
    for match in matches:
        subject, word = match["subject"].strip(), match["word"]
        if not {subject, word} & seen:
            claims.append(Claim(match[0], _weight(word, match["adverb"], match["negation"])))
        seen |= {subject, word}
    return claims


def _weight(word: str, adverb: str | None, negation: str | None) -> float:
    weight = ADJECTIVES[word] if word in ADJECTIVES else VERBS[word]
    return weight * ADVERBS.get(adverb or "", 1.0) * (NEGATED if negation else 1.0)
