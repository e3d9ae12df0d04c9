"""A rank that compares loss and gradients of a sharded model with an unsharded one, in fp64, for every model family.

Argument: the output file, for the largest difference of each family as JSON.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator

from exo.data.collate import Collator
from exo.data.text.tokenize import TokenizedExample
from exo.distributed import fsdp
from exo.training import preference
from tests.models.test_head import FAMILIES, is_available, tiny

GROUPS = [
    TokenizedExample((3, 4, 5), ((6, 7, 1), (8, 1)), (1.0, 0.0), 1, (-3.0, -2.0)),
    TokenizedExample((9,), ((10, 11, 12, 1), (13, 1), (14, 15, 1)), (0.5, 2.0, 1.0), 2, (-5.0, -1.0, -2.0)),
]


def largest_difference(model, accelerator) -> float:
    unsharded, sharded = model, copy.deepcopy(model)
    fsdp.shard(sharded, accelerator)
    results = []
    for one in (unsharded, sharded):
        module = preference.PreferenceLoss(
            one, loss="exo", beta_pi=0.5, beta_r=1.0, label_smoothing=0.0, temperature=1.0
        ).train(False)  # fmt: skip
        batch = Collator(0, 4096).collate(GROUPS)
        loss = fsdp.run_unsharded_root(module, lambda module=module, batch=batch: module(batch, 2).loss)
        loss.backward()
        gradients = {name: fsdp.full_tensor(p.grad) for name, p in module.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (loss, gradients), (sharded_loss, sharded_gradients) = results
    assert gradients.keys() == sharded_gradients.keys() and gradients
    assert all(isinstance(p, fsdp.DTensor) for p in sharded.parameters())
    return max(
        float((loss - sharded_loss).abs()),
        *(float((gradients[n] - sharded_gradients[n]).abs().max()) for n in gradients),
    )


def main(argv: list[str]) -> int:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    accelerator = Accelerator(cpu=True)
    differences = {family: largest_difference(tiny(family), accelerator) for family in FAMILIES if is_available(family)}
    if accelerator.is_main_process:
        Path(argv[0]).write_text(json.dumps(differences))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
