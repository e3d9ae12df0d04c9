"""Benchmarks of time, memory and accuracy of exo_kernels against PyTorch and other libraries; see README.md."""
