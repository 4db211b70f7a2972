"""One sum, many orders."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "measure": ["KINDS", "arrivals", "distribution", "errors", "every_order", "exact", "fixed_point",
                "kahan", "numbers", "pairwise", "permutations", "sequential", "shuffles", "split", "summary", "ulp"],
    "chart": ["distribution_chart", "number_line"],
    "widget": ["SumOrders"],
})
