"""Generate the texts of the quickstart: reviews of films, restaurants, hotels and books, from a grammar.

    prompt          the thriller we watched on friday
    continuation    was not bad , but the script felt rather wooden . i liked it .

Lower case, words and punctuation separated by single blanks, 12 to 24 words in all. A review has a good, a bad or a
mixed mood, and the corpus praises as often as it blames; alignment changes that. Every subject is singular.
"""

import random
from typing import Literal, NamedTuple

from exo.experiments.quickstart.oracle import ADJECTIVES

SHORTEST, LONGEST = 12, 24
TRAIN_PROMPTS, TEST_PROMPTS = 192, 256

WHO = ("i", "we", "my sister", "my parents")
WHEN = ("last week", "on friday", "in june", "this spring", "yesterday")
COPULAS = ("was", "was", "seemed", "felt")
ADVERBS = ("very", "really", "truly", "quite", "rather", "fairly", "slightly")
PRAISE = (
    "loved it",
    "loved it from the start",
    "liked it",
    "really enjoyed it",
    "did not regret it",
    "would recommend it",
    "would gladly recommend it to anyone",
)
BLAME = (
    "hated it",
    "regretted it",
    "disliked it",
    "did not enjoy it",
    "would avoid it",
    "would not recommend it",
    "would never recommend it to anyone",
)


class Domain(NamedTuple):
    """The words of reviews of one kind of thing."""

    things: tuple[str, ...]
    verbs: tuple[str, ...]
    aspects: tuple[str, ...]
    adjectives: tuple[str, ...]  # of these aspects, of both signs, which the oracle knows
    asides: tuple[str, ...]  # sentences that claim nothing


DOMAINS = (
    Domain(
        ("film", "movie", "comedy", "thriller"),
        ("watched", "saw"),
        ("acting", "plot", "script", "music", "ending", "camera work"),
        ("gripping", "moving", "funny", "clever", "wooden", "predictable", "tedious"),
        ("it lasted two hours", "we sat in the front row", "it opened last month"),
    ),
    Domain(
        ("restaurant", "cafe", "bistro", "diner"),
        ("tried", "visited"),
        ("soup", "bread", "pasta", "dessert", "salad", "fish"),
        ("delicious", "tasty", "fresh", "generous", "stale", "bland", "greasy"),
        ("we ordered the soup", "we sat near the window", "it opened last month"),
    ),
    Domain(
        ("hotel", "hostel", "motel", "lodge"),
        ("booked", "chose"),
        ("room", "lobby", "bathroom", "bar", "lounge", "terrace"),
        ("clean", "cosy", "bright", "inviting", "noisy", "cramped", "dirty", "shabby"),
        ("we stayed two nights", "it stands near the station", "we arrived in the evening"),
    ),
    Domain(
        ("book", "novel", "memoir", "story"),
        ("read", "finished"),
        ("plot", "opening", "ending", "hero", "prose", "dialogue"),
        ("gripping", "moving", "witty", "clever", "shallow", "confusing", "tedious"),
        ("it has three parts", "a friend lent it to me", "it came out last month"),
    ),
)
_DOMAIN_OF = {thing: domain for domain in DOMAINS for thing in domain.things}
# Adjectives of no domain fit any subject.
_GENERAL = ADJECTIVES.keys() - {word for domain in DOMAINS for word in domain.adjectives}
GOOD = tuple(word for word in ADJECTIVES if word in _GENERAL and ADJECTIVES[word] > 0)
BAD = tuple(word for word in ADJECTIVES if word in _GENERAL and ADJECTIVES[word] < 0)


def prompts(split: Literal["train", "test"]) -> list[str]:
    """Return openings of reviews. The splits share no opening, but their words are the same."""
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    drawn = random.Random(0).sample(_all_prompts(), TRAIN_PROMPTS + TEST_PROMPTS)
    return drawn[:TRAIN_PROMPTS] if split == "train" else drawn[TRAIN_PROMPTS:]


def corpus(n: int, seed: int) -> list[tuple[str, str]]:
    """Return `n` pairs (prompt, continuation), which a blank joins; the prompts are of the train split."""
    rng = random.Random(seed)
    openings = prompts("train")
    return [(opening, _continuation(rng, opening)) for opening in rng.choices(openings, k=n)]


def vocabulary() -> list[str]:
    """Return all words and punctuation marks of reviews, sorted."""
    phrases = [*_all_prompts(), *COPULAS, *ADVERBS, *GOOD, *BAD, *PRAISE, *BLAME, "the not and but , ."]
    for domain in DOMAINS:
        phrases += [*domain.aspects, *domain.adjectives, *domain.asides]
    return sorted({word for phrase in phrases for word in phrase.split()})


def _all_prompts() -> list[str]:
    return [
        opening
        for domain in DOMAINS
        for thing in domain.things
        for verb in domain.verbs
        for who in WHO
        for when in WHEN
        for opening in (f"the {thing} {who} {verb} {when}", f"{when} {who} {verb} a {thing} that")
    ]


def _continuation(rng: random.Random, opening: str) -> str:
    domain = next(_DOMAIN_OF[word] for word in opening.split() if word in _DOMAIN_OF)
    while True:
        text = _review(rng, domain)
        if SHORTEST <= len(f"{opening} {text}".split()) <= LONGEST:
            return text


def _review(rng: random.Random, domain: Domain) -> str:
    """Return a claim about the thing, claims about one to three of its aspects, an aside and a verdict."""
    praise = rng.choice((1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.5))  # the mood: how likely a claim is to praise
    aspects = rng.sample(domain.aspects, k=3)
    good = _chance(rng, praise)
    text = _claim(rng, good)
    if _chance(rng, 0.7):
        text += _linked(rng, domain, aspects.pop(), praise, good, comma=" ,")
    text += " ."
    if _chance(rng, 0.2):
        text += f" {rng.choice(domain.asides)} ."
    if _chance(rng, 0.7):
        good = _chance(rng, praise)
        text += f" the {aspects.pop()} {_claim(rng, good, domain.adjectives)}"
        if _chance(rng, 0.3):
            text += _linked(rng, domain, aspects.pop(), praise, good, comma="")
        text += " ."
    if _chance(rng, 0.7):
        verdict = rng.choice(PRAISE if _chance(rng, praise) else BLAME)
        text += f" {rng.choice(('i', 'we'))} {verdict} ."
    return text


def _linked(rng: random.Random, domain: Domain, aspect: str, praise: float, previous_good: bool, comma: str) -> str:
    good = _chance(rng, praise)
    link = "and" if good == previous_good else "but"
    return f"{comma} {link} the {aspect} {_claim(rng, good, domain.adjectives)}"


def _claim(rng: random.Random, good: bool, adjectives: tuple[str, ...] = ()) -> str:
    """Return a claim such as `was rather dull`, or one that denies the opposite: `was not very good`."""
    denied = _chance(rng, 0.08)
    positive = good != denied
    special = [word for word in adjectives if (ADJECTIVES[word] > 0) == positive]
    choices = special if special and _chance(rng, 0.4) else GOOD if positive else BAD
    adverb = f"{rng.choice(ADVERBS)} " if _chance(rng, 0.4) else ""
    return f"{rng.choice(COPULAS)} {'not ' if denied else ''}{adverb}{rng.choice(choices)}"


def _chance(rng: random.Random, probability: float) -> bool:
    return rng.random() < probability
