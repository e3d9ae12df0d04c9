"""Two systems' answers to the same prompts, side by side: what the stages judge and label are made of.

systems      reads a system's answers and joins them with another's
endpoint     asks a chat model
verdicts     templates, the choice in an answer, a cache of answers
winrate      points, win rate, position bias
sheets       blind sheets for human raters, out and back
agreement    majorities and how far the raters agree
"""
