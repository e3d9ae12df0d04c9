"""From hidden states to log-probabilities and losses, without the full logits.

plan (which schedule, which chunks) -> passes (the loops over chunks) -> chunks (one chunk) -> matmul, and the chunk
kernels of the implementation. vocab_parallel combines the results of ranks that hold a part of the vocabulary each.
"""
