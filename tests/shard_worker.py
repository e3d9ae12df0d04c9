"""Loss and gradients of PreferenceLoss on a model in shards, on one of two processes, for every family of models.

Argument: a file for what differs most from the same model whole, by family, in fp64.
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
from tests.models.test_head import FAMILIES, known, tiny

GROUPS = [
    TokenizedExample((3, 4, 5), ((6, 7, 1), (8, 1)), (1.0, 0.0), 1, (-3.0, -2.0)),
    TokenizedExample((9,), ((10, 11, 12, 1), (13, 1), (14, 15, 1)), (0.5, 2.0, 1.0), 2, (-5.0, -1.0, -2.0)),
]


def differs(model, accelerator) -> float:
    whole, parts = model, copy.deepcopy(model)
    fsdp.shard(parts, accelerator)
    found = []
    for one in (whole, parts):
        module = preference.PreferenceLoss(
            one, loss="exo", beta_pi=0.5, beta_r=1.0, label_smoothing=0.0, temperature=1.0
        ).train(False)  # fmt: skip
        batch = Collator(0, 4096).collate(GROUPS)
        loss = fsdp.run_unsharded_root(module, lambda module=module, batch=batch: module(batch, 2).loss)
        loss.backward()
        gradients = {name: fsdp.full_tensor(p.grad) for name, p in module.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    (loss, gradients), (other, others) = found
    assert gradients.keys() == others.keys() and gradients
    assert all(isinstance(p, fsdp.DTensor) for p in parts.parameters())
    return max(float((loss - other).abs()), *(float((gradients[n] - others[n]).abs().max()) for n in gradients))


def main(argv: list[str]) -> int:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    accelerator = Accelerator(cpu=True)
    found = {family: differs(tiny(family), accelerator) for family in FAMILIES if known(family)}
    if accelerator.is_main_process:
        Path(argv[0]).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
