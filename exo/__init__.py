"""A training layer on exo_kernels: fine-tune, sample, align, evaluate. `python -m exo.train` is a full run."""
