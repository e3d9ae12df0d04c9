"""Benchmarks of time, memory and accuracy of exo_kernels against PyTorch and other libraries; see README.md."""

import os

# before torch is imported: a thread of OpenMP that waits and spins takes the core that another process needs
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
