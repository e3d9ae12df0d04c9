"""The dtype in which numbers are added up, and in which results come: said once, for every implementation."""

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
