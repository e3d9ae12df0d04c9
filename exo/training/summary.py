"""Lines that describe an alignment before it trains, and its evaluations."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from exo import models
from exo.cli import console
from exo.data.text.tokenize import TokenizedExample

HEAD_BUDGET = 2**29  # default memory_budget of the losses on hidden states, in bytes


def describe(
    model: Any,
    examples: Sequence[TokenizedExample],
    accelerator: Accelerator,
    *,
    loss: str,
    steps: int,
    batch_size: int,
    **memory: Any,
) -> None:
    """Print the model, the objective, the size of the data and the memory of a rank; `memory`: see estimate_memory."""
    kind = "preferences" if examples[0].rewards is None else "rewards"
    sizes = sorted({len(example.completions) for example in examples})
    lengths = sorted(example.longest for example in examples)
    console.log(
        f"{type(model).__name__}, {models.parameter_count(model) / 1e6:,.1f}M parameters, {accelerator.device}, "
        f"{accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'fp32'}\n"
        f"{loss.upper()} on {kind}, K {sizes[0]}{f' to {sizes[-1]}' if len(sizes) > 1 else ''}, "
        f"{len(examples):,} prompts for training, {steps:,} steps of {batch_size}\n"
        f"longest row of a prompt: median {lengths[len(lengths) // 2]} tokens, most {lengths[-1]}\n"
        f"memory: about {estimate_memory(model, examples, accelerator, **memory) / 2**30:.2f} GiB a process "
        "(weights, gradients, Adam, the head's working memory; activations come on top)"
    )


def estimate_memory(
    model: Any,
    examples: Sequence[TokenizedExample],
    accelerator: Accelerator,
    *,
    max_tokens: int,  # of a micro-batch
    adapter: bool,  # LoRA, whose gradients and moments are next to nothing
    second_model: bool,  # a reference that scores
    shards: int,  # ranks that share the weights
) -> int:
    """Return the bytes that a rank needs without activations.

    Weights, gradients and two moments; the larger of autocast's 16-bit weights and a second model; and the head's
    budget, or twice the logits of the largest micro-batch if that is less.
    """
    widest = max(example.longest * len(example.completions) for example in examples)
    total = sum(example.longest * len(example.completions) for example in examples)
    tokens = min(max(max_tokens, widest), total)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    autocast = 0 if accelerator.mixed_precision == "no" else 2
    per_parameter = (0 if adapter else 12) + (4 if second_model else autocast)
    weights = sum(p.numel() * (1 if p.dtype == torch.uint8 else 4) for p in model.parameters())
    model_bytes: int = weights + per_parameter * models.parameter_count(model)
    return model_bytes // shards + min(HEAD_BUDGET, 2 * 4 * tokens * vocabulary)


def evaluation(result: Mapping[str, float], n: int) -> str:
    """Return an evaluation of `n` held-out prompts on one line."""
    parts = [f"loss {result['eval_loss']:.4f}"]
    if "eval_rewards/accuracies" in result:
        parts.append(
            f"accuracy {100 * result['eval_rewards/accuracies']:.1f}% "
            f"(95% interval {100 * result['eval_accuracy_low']:.1f} to {100 * result['eval_accuracy_high']:.1f}), "
            f"margin {result['eval_rewards/margins']:+.4f}"
        )
    return ", ".join(parts) + f", {n:,} held-out prompts"
