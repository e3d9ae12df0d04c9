"""A generated task: short reviews, and a scorer of their sentiment.

prompts("train"), prompts("test")     openings of reviews; those of test are never trained on
corpus(n, seed)                       (prompt, continuation) pairs of mixed sentiment
vocabulary()                          all words of reviews
score(text)                           the reward: sentiment in log-odds, between -6 and 6
reward(prompt, continuation)          the same, for `--oracle exo.experiments.quickstart:reward`
explain(text)                         the claims whose weights make up the score
"""

from exo.experiments.quickstart.grammar import corpus, prompts, vocabulary
from exo.experiments.quickstart.oracle import explain, reward, score

__all__ = ["corpus", "explain", "prompts", "reward", "score", "vocabulary"]
