"""Serving: a paged cache, a scheduler, and an engine that batches requests as they come. `engine` shows its use."""
from ..model.sampling import Sampler
from .engine import Engine
from .pages import PagedCache
from .request import Request, digest_of

__all__ = ["Engine", "PagedCache", "Request", "Sampler", "digest_of"]
