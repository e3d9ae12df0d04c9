"""`exo.align` on one of several ranks, which stops where their gradients are not the same bits before an update."""

import sys

import torch
import torch.distributed as dist

from exo import align, steps

update = steps.update


def checked(module, optim, config, accelerator, *rest):
    flat = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    if dist.is_initialized():
        found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(found, flat)
        assert len(found) == 2 and torch.equal(found[0], found[1]), "gradients differ between ranks"
        if accelerator.is_main_process:
            print(f"gradients of {flat.numel()} numbers are the same on 2 ranks")
    return update(module, optim, config, accelerator, *rest)


steps.update = checked
sys.exit(align.main(sys.argv[1:]))
