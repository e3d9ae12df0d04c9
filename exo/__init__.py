"""A thin training layer on exo_kernels: fine-tune, sample, align, evaluate. `python -m exo.train` is a full run."""

import importlib.util
import os
import sys

from exo.cli import streams

_NEEDED = ("accelerate", "matplotlib", "rich", "safetensors", "tokenizers", "transformers", "yaml")

if sys.argv[0] == "-m":
    streams.prepare()
    # Threads of OpenMP that wait by spinning take the core that the others need: with anything else to do on two cores,
    # a training step became eight times slower. It must be said before torch is loaded; who said otherwise is heard.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if _missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    _message = f"exo needs {', '.join(_missing)}: pip install 'exo-kernels[train]'"
    if sys.argv[0] == "-m":  # `python -m exo.<stage>`: one line, no traceback
        raise SystemExit(_message)
    raise ModuleNotFoundError(_message, name=_missing[0])
