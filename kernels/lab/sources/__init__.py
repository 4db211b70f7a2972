"""The sources of moving bits, each with its demonstration."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "claims": ["PROPERTIES", "SOURCES", "beside", "moved", "names", "observe", "recorded", "table"],
    "chart": ["answers"],
})
