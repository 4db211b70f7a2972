"""The model that a sampler and a trainer share."""
from .config import PRESETS, Config, preset
from .folder import load, save
from .llama import Llama
from .sampling import Sampler, log_probs

__all__ = ["PRESETS", "Config", "Llama", "Sampler", "load", "log_probs", "preset", "save"]
