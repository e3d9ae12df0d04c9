"""The road from data to an aligned model. Without --data: the quickstart, offline, in minutes, on a laptop.

python -m exo.train                                          the quickstart
python -m exo.train --model DIR_OR_NAME --data FILE          align a model (all options: --help)
python -m exo.train --model tiny --data FILE                 the same without weights, for a trial
"""

import sys
from collections.abc import Sequence

from exo import align
from exo.quickstart import recipe

ALIGN_FLAGS = ("--data", "--model", "--config")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = {argument.split("=")[0] for argument in arguments}
    if names & set(ALIGN_FLAGS):
        return align.main(arguments)
    if names & {"--help", "-h"}:
        print(__doc__)
    return recipe.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
