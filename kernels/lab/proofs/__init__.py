"""What shows that bits are kept: digests, certificates, generated code, a tensor core's sums."""
