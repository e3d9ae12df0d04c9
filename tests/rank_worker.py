"""`exo.align` on one or several ranks that prints which code paths it took: layout, schedule, reference, checkpoints.

On several ranks it fails if their gradients are not bit-identical before an update.
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
    gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    gathered = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, gradient)
    return len(gathered) == 2 and torch.equal(*gathered)


@contextmanager
def record_paths(paths: dict):
    """Record in `paths` the code paths that a run takes inside this context."""
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
        arguments = reference(self, batch)
        paths["reference"] = sorted({*paths["reference"], *arguments} & {"ref_hidden", "ref_logps"})
        paths["layouts"] = sorted({*paths["layouts"], "padded" if batch.segment_ids is None else "several texts a row"})
        return arguments

    def choosing(*arguments, **options):
        choice = choose(*arguments, **options)
        paths["schedules"] = sorted({*paths["schedules"], choice[0]})
        return choice

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
    paths: dict = {}
    with record_paths(paths):
        code = align.main(sys.argv[1:])
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"paths: {json.dumps(paths)}", flush=True)
    sys.exit(code)
