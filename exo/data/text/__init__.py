"""From prompts and completions to token ids: chat templates, tokenization, length limits."""
