"""Reference log-probs by two processes of which one knows more than the other, as where each has a cache of its own.

Arguments: a directory; how many lines each process knows. Ends well if all numbers are those of one that knew none.
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
    directory, known = Path(argv[0]), [int(n) for n in argv[1:]]
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model, _ = models.tiny(["a b c d e f g"], hidden_size=32, num_layers=2, num_heads=2)
    rows, collator, rank = examples([3] * 9, far=0.0), Collator(0, 16), accelerator.process_index
    expected = reference.score(model, rows, accelerator, collator, 1.0, directory / "whole")
    (whole,) = (directory / "whole").iterdir()
    own = directory / str(rank)
    own.mkdir()
    (own / whole.name).write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[: 1 + known[rank]]))
    found = reference.score(model, rows, accelerator, collator, 1.0, own)
    return 0 if [g.ref_logps for g in found] == [g.ref_logps for g in expected] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
