"""How numbers are added, in PyTorch and in Triton."""
