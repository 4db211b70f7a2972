"""Decode, verify, roll back on the byte model: what is recomputed, and what a mix of requests costs."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "measure": ["ROLLBACKS", "rollbacks", "served"],
    "explore": ["Costs", "Mix", "Served", "costs", "measured", "predicted"],
    "chart": ["explored", "mix_chart", "protocol_chart", "rollbacks_chart"],
    "widget": ["MixExplorer"],
})
