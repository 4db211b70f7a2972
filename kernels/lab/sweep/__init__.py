"""Time and bits of an op's contenders over token counts."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "options": ["Sweep"],
    "measure": ["sweep"],
    "chart": ["claim", "sweep_chart"],
    "widget": ["TokenSweep"],
})
