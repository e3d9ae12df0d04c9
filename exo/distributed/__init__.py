"""Several processes: the accelerator, gathering, FSDP and DeepSpeed."""
