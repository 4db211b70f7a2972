"""Which of PyTorch's own ops move their bits, and what moves them."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "measure": ["ATLAS", "PROPERTIES", "atlas", "machines", "recorded", "verdict"],
    "cases": ["CASES"],
    "chart": ["atlas_chart"],
    "widget": ["Atlas"],
})
