"""Attention: one sequence computed in seven ways, the order of its keys, and the exponential unit's errors."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "measure": ["Way", "leaf_by_hand", "seven_ways", "unit_errors"],
    "chart": ["key_order", "unit_chart", "ways_chart"],
})
