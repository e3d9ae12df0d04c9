"""A thin training layer on exo_kernels: from preference or reward data to an aligned model."""
