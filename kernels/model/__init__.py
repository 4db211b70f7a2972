"""The model that a sampler and a trainer share."""
from .config import PRESETS, Config, preset
from .llama import Llama

__all__ = ["PRESETS", "Config", "Llama", "preset"]
