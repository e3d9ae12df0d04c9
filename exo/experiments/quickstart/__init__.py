"""A controlled-generation task made by the program: short reviews, a judge of their sentiment.

prompts("train"), prompts("test")     openings of reviews; the test ones never reach training
corpus(n, seed)                       (prompt, continuation) pairs of mixed sentiment
vocabulary()                          every word that can occur
score(text)                           the reward: sentiment in log-odds, between -6 and 6
reward(prompt, continuation)          the same, as `--oracle exo.experiments.quickstart:reward` takes it
explain(text)                         the claims that a score is made of
"""

from exo.experiments.quickstart.grammar import corpus, prompts, vocabulary
from exo.experiments.quickstart.oracle import explain, score

__all__ = ["corpus", "explain", "prompts", "reward", "score", "vocabulary"]


def reward(prompt: str, continuation: str) -> float:
    """Sentiment of the whole review."""
    return score(f"{prompt} {continuation}")
