"""Which op of a model moves its bits: any nn.Module, alone and in a batch, every module and every ATen call watched."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "measure": ["Call", "Report", "WAYS", "find_moving_ops"],
    "cost": ["MODE_COST", "layer_cost", "mode_cost"],
    "examples": ["Planted", "example_model", "example_prompts", "has_transformers", "logits", "padded"],
    "chart": ["claim", "moving_chart", "moving_words"],
})
