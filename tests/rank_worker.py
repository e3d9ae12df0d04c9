"""`exo.align`, alone or on one of several ranks, saying at the end by which paths it ran.

On several ranks it stops where their gradients are not the same bits before an update.
"""

import json
import sys
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist

from exo import align
from exo.training import preference, step
from exo_kernels.schedules import plan


def same_on_all_ranks(module) -> bool:
    flat = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    return len(found) == 2 and torch.equal(*found)


@contextmanager
def watched(paths: dict):
    """Fills `paths` while it lasts."""
    accumulate, update, reference, choose = (
        step.accumulate,
        step.update,
        preference.PreferenceLoss._reference,
        plan.choose,
    )
    checkpoint = torch.utils.checkpoint.checkpoint
    paths |= {"micro_batches": 0, "checkpoints": 0, "reference": [], "layouts": [], "schedules": [], "ranks": 1}

    def accumulating(module, parts, *rest):
        paths["micro_batches"] = max(paths["micro_batches"], len(parts))
        return accumulate(module, parts, *rest)

    def updating(module, optim, config, accelerator, *rest):
        if dist.is_initialized():
            assert same_on_all_ranks(module), "gradients differ between ranks"
            paths["ranks"] = dist.get_world_size()
        return update(module, optim, config, accelerator, *rest)

    def referring(self, batch):
        found = reference(self, batch)
        paths["reference"] = sorted({*paths["reference"], *found} & {"ref_hidden", "ref_logps"})
        paths["layouts"] = sorted({*paths["layouts"], "padded" if batch.segment_ids is None else "several texts a row"})
        return found

    def choosing(*arguments, **options):
        found = choose(*arguments, **options)
        paths["schedules"] = sorted({*paths["schedules"], found[0]})
        return found

    def checkpointing(*arguments, **options):
        paths["checkpoints"] += 1
        return checkpoint(*arguments, **options)

    with (
        mock.patch.object(step, "accumulate", accumulating),
        mock.patch.object(step, "update", updating),
        mock.patch.object(preference.PreferenceLoss, "_reference", referring),
        mock.patch.object(plan, "choose", choosing),
        mock.patch.object(torch.utils.checkpoint, "checkpoint", checkpointing),
        mock.patch("transformers.modeling_utils.checkpoint", checkpointing),
    ):  # fmt: skip
        yield


if __name__ == "__main__":
    found: dict = {}
    with watched(found):
        code = align.main(sys.argv[1:])
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"paths: {json.dumps(found)}", flush=True)
    sys.exit(code)
