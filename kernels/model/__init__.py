"""The model that a sampler and a trainer share."""
