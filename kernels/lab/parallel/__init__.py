"""A model on several GPUs or processes: ranks on this machine, what they do, the record, its chart and widget."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "chart": ["recorded", "study"],
    "processes": ["Processes"],
    "widget": ["GpuChart"],
    "work": ["leaves_of", "tree_of"],
})
