"""One request in many batches: what of its text and its logits moves with the neighbours."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "measure": ["Answer", "REQUEST", "SIZES", "answer", "answers", "byte_model", "fixed_ops", "flipping_seed",
                "flipping_seeds", "generate", "layer_table", "requests", "rows_by_layer", "smallest_lead"],
    "chart": ["batches_chart", "batches_words", "study"],
    "loads": ["COUNT", "PROMPT", "Server", "crowd", "random_load"],
    "served": ["Served", "first_difference", "sampler_of", "serve"],
    "tree": ["tree_chart", "tree_words"],
    "score": ["scores"],
    "widget": ["BatchSlider", "ServerSettings"],
})
