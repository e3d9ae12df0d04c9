"""Sample completions from a model and score them."""
