"""What shows that bits are kept: digests, generated code, a tensor core's sums."""
