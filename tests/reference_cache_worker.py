"""A rank that computes reference log-probs with its own cache, which holds more or less than those of other ranks.

Arguments: a directory; the number of cached lines of each rank. The exit code is 0 if the log-probs equal those
computed without a cache.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from exo import models
from exo.data.collate import Collator
from exo.training import reference
from tests.parallel_worker import examples


def main(argv: list[str]) -> int:
    directory, cached_lines = Path(argv[0]), [int(n) for n in argv[1:]]
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model, _ = models.tiny(["a b c d e f g"], hidden_size=32, num_layers=2, num_heads=2)
    rows, collator, rank = examples([3] * 9, far=0.0), Collator(0, 16), accelerator.process_index
    expected = reference.score(model, rows, accelerator, collator, 1.0, directory / "full")
    (full_cache,) = (directory / "full").iterdir()
    cache = directory / str(rank)
    cache.mkdir()
    (cache / full_cache.name).write_bytes(
        b"".join(full_cache.read_bytes().splitlines(keepends=True)[: 1 + cached_lines[rank]])
    )
    result = reference.score(model, rows, accelerator, collator, 1.0, cache)
    return 0 if [g.ref_logps for g in result] == [g.ref_logps for g in expected] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
