"""What one forward over a window of tokens costs."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "measure": ["VERIFY_COST", "WINDOWS", "Ceilings", "Watch", "floor_ms", "products", "window_cost"],
    "chart": ["caption", "claim", "published", "window_chart"],
    "widget": ["WindowCost"],
})
