"""A tensor core's addition, step by step."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "chart": ["example", "study"],
    "widget": ["AdderSteps"],
})
