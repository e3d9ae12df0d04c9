"""From hidden states to log-probabilities and losses; the full logits never exist.

api -> plan (which schedule, which chunks) -> ops (custom operators) -> schedules (the four loops over chunks) -> head
(the matmuls) and the implementation's chunk kernels (chunked/linear.py, _triton/linear.py). vocab_parallel joins what
ranks know that hold a part of the vocabulary each.
"""
