"""The road from data to an aligned model. Without --data: the quickstart, offline, in minutes, on a laptop.

python -m exo.train                                          the quickstart
python -m exo.train --model DIR_OR_NAME --data FILE          align a model; python -m exo.align --help: all options
python -m exo.train --model tiny --data FILE                 the same without weights, for a trial
"""

import dataclasses
import sys
from collections.abc import Sequence

from exo import align
from exo.quickstart import recipe


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = {argument.split("=")[0].lstrip("-").replace("-", "_") for argument in arguments if argument[:2] == "--"}
    if flags & {"help"} or "-h" in arguments:
        print(__doc__)
    # what only alignment knows (--data, --config, --learning_rate) is for alignment, which says what it misses
    quickstart = {field.name for field in dataclasses.fields(recipe.Config)} | {"help"}
    return recipe.main(arguments) if flags <= quickstart else align.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
