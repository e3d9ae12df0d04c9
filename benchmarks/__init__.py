"""Time and memory of exo_kernels against what PyTorch offers; see README.md."""
