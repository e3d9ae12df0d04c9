"""The public functions: check the arguments, choose the implementation, call one operator."""
