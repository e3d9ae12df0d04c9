"""A rank that takes eight fp64 steps of PreferenceLoss on groups of very uneven lengths and saves the weights.

Arguments: the strategy (ddp, fsdp, zero1 or zero2; "-fp32" selects fp32, because DeepSpeed has no fp64, and "-bf16"
autocast over fp32 with references far from the policy); the output file; the sizes of the groups, as JSON; the maximum
number of tokens of a micro-batch.
"""

import json
import os
import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from exo import models
from exo.data.collate import Collator
from exo.data.text.tokenize import TokenizedExample
from exo.distributed import deepspeed, fsdp
from exo.training import preference
from exo.training import step as training_step
from exo.training.optimizer import OptimizerSettings, optimizer


def examples(sizes: list[int], far: float) -> list[TokenizedExample]:
    draw = torch.Generator().manual_seed(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 40, (n,), generator=draw).tolist())

    return [
        TokenizedExample(ids(1 + i), tuple(ids(1 + (i * k) % size) for k in range(2 + i % 3)),
                   tuple(float(k) for k in range(2 + i % 3)), i, tuple(-far - float(k) for k in range(2 + i % 3)))
        for i, size in enumerate(sizes)
    ]  # fmt: skip


def main(argv: list[str]) -> int:
    strategy, file, sizes, max_tokens = argv[0], argv[1], json.loads(argv[2]), int(argv[3])
    torch.set_num_threads(1)
    strategy, _, dtype = strategy.partition("-")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if dtype == "bf16" else "no")
    model, _ = models.tiny(["a b c d e f g"], hidden_size=32, num_layers=2, num_heads=2)
    model = model if dtype else model.double()
    if strategy == "fsdp":
        fsdp.shard(model, accelerator)
    objective = dict(loss="exo", beta_pi=0.5, beta_r=1.0, label_smoothing=0.0, temperature=1.0)
    module = preference.PreferenceLoss(model, **objective).train(False)
    settings = OptimizerSettings(learning_rate=1e-3)
    if strategy == "fsdp":
        wrapped, optim = module, accelerator.prepare(optimizer(module, settings))
    elif strategy.startswith("zero"):
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = strategy.removeprefix("zero")
        wrapped, optim = deepspeed.prepare(module, optimizer(module, settings), settings.max_grad_norm, accelerator)
    else:
        wrapped, optim = accelerator.prepare(module, optimizer(module, settings))
    collator = Collator(0, max_tokens)
    step = training_step.TrainStep(wrapped, optim, settings, accelerator, len, collator.collate, collator, 8)
    counters = dict.fromkeys(training_step.COUNTERS, 0.0)
    rows = examples(sizes, far=1000.3 if dtype == "bf16" else 0.0)
    losses = [step(i, rows, counters, quiet=True, first=None)[0]["loss"] for i in range(1, 9)]
    weights = {name: fsdp.full_tensor(p).detach().clone() for name, p in module.named_parameters()}
    if accelerator.is_main_process:
        save_file(weights | {"losses": torch.tensor(losses, dtype=torch.float64)}, file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
