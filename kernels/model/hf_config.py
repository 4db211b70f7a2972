"""A Hugging Face config.json, read and written: what it asks for that is not implemented is refused by name.

Two forms are read: rope_theta with rope_scaling, and rope_parameters, which transformers writes from version 5 on.
Fields that no forward depends on (dropout, token numbers, caching) are passed over.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .config import Config, RopeScaling

FILE = "config.json"
ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
_SIZES = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
          "num_hidden_layers": "layers", "num_attention_heads": "heads", "max_position_embeddings": "context"}
# field -> the values that are implemented; a field left out is like the first
_ONLY = {"hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None),
         "use_sliding_window": (False, None), "quantization_config": (None,), "pretraining_tp": (1, None),
         "partial_rotary_factor": (1.0, None)}
_LLAMA3 = {"factor": "factor", "low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor",
           "original_max_position_embeddings": "original_context"}


def read(folder: Path) -> Config:
    """The Config in a folder's config.json. Raises FileNotFoundError, or ValueError that names file and field."""
    file = folder / FILE
    given = read_json(file)
    qk_norm = _architecture(file, given) == "Qwen3ForCausalLM"
    for field, allowed in _ONLY.items():
        if (value := given.get(field, allowed[0])) not in allowed:
            raise ValueError(f"{file}: {field} is {value!r}, and only {allowed[0]!r} is implemented")
    _check_attention(file, given)
    sizes = {ours: _number(file, given, field, int) for field, ours in _SIZES.items()}
    kv_heads = sizes["heads"] if given.get("num_key_value_heads") is None else \
        _number(file, given, "num_key_value_heads", int)
    theta, scaling = _rope(file, given)
    try:
        return Config(name=folder.resolve().name, **sizes, kv_heads=kv_heads,
                      head_dim=_head_dim(file, given, 128 if qk_norm else None),
                      tied_embeddings=_switch(file, given, "tie_word_embeddings"), rope_theta=theta,
                      rope_scaling=scaling, norm_eps=_number(file, given, "rms_norm_eps", float), qk_norm=qk_norm,
                      shared=given.get("shared", 1))
    except ValueError as error:
        raise error if str(error).startswith(str(file)) else ValueError(f"{file}: {error}") from None


def written(config: Config, dtype: str) -> dict[str, Any]:
    """What config.json holds for a model of this dtype, in the form that every transformers reads."""
    architecture = "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"
    scaling = config.rope_scaling and {"rope_type": "llama3"} | {
        theirs: getattr(config.rope_scaling, ours) for theirs, ours in _LLAMA3.items()}
    return {"architectures": [architecture], "model_type": ARCHITECTURES[architecture],
            **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
            "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "hidden_act": "silu",
            "attention_bias": False, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
            "rope_scaling": scaling, "tie_word_embeddings": config.tied_embeddings, "torch_dtype": dtype,
            **({"shared": config.shared} if config.shared != 1 else {})}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError that names the file, for anything else."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(given).__name__}")
    return given


def _architecture(file: Path, given: dict) -> str:
    found = given.get("architectures")
    if not isinstance(found, list) or len(found) != 1 or found[0] not in ARCHITECTURES:
        raise ValueError(f"{file}: architectures must be one of {', '.join(ARCHITECTURES)}, got {found!r}")
    return found[0]


def _check_attention(file: Path, given: dict) -> None:
    kinds = given.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(kinds) - {"full_attention"}):
        raise ValueError(f"{file}: layer_types names {kinds!r}, and only full_attention is implemented")
    if given.get("sliding_window") is not None and "use_sliding_window" not in given:
        raise ValueError(f"{file}: sliding_window is {given['sliding_window']!r}, and only null is implemented")


def _head_dim(file: Path, given: dict, default: int | None) -> int:
    if given.get("head_dim") is not None:
        return _number(file, given, "head_dim", int)
    if default is None and given["hidden_size"] % given["num_attention_heads"]:
        raise ValueError(f"{file}: head_dim is missing, and hidden_size = {given['hidden_size']} is no multiple of "
                         f"num_attention_heads = {given['num_attention_heads']}")
    return default or given["hidden_size"] // given["num_attention_heads"]


def _rope(file: Path, given: dict) -> tuple[float, RopeScaling | None]:
    """rope_theta, and Llama 3.1's scaling if it is asked for."""
    name = "rope_parameters" if given.get("rope_parameters") is not None else "rope_scaling"
    rope = given.get(name) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{file}: {name} must be an object or null, got {rope!r}")
    theta = _number(file, rope if "rope_theta" in rope else given, "rope_theta", float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{file}: {name} has rope_type {kind!r}, and only 'default' and 'llama3' are implemented")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{file}: {name} has partial_rotary_factor {rope['partial_rotary_factor']!r}, and only 1.0 is "
                         "implemented")
    if kind == "default":
        return theta, None
    numbers = {ours: _number(file, rope, field, int if ours == "original_context" else float, name)
               for field, ours in _LLAMA3.items()}
    try:
        return theta, RopeScaling(**numbers)
    except ValueError as error:
        raise ValueError(f"{file}: {name}: {error}") from None


def _number(file: Path, given: dict, field: str, kind: type, within: str = "") -> Any:
    """A number of config.json; a whole one of at least 1 for int, a float otherwise."""
    value, where = given.get(field), f"{file}: {within and within + ' '}{field}"
    if value is None:
        raise ValueError(f"{where} is missing")
    if kind is int and (type(value) is not int or value < 1):
        raise ValueError(f"{where} must be a whole number of at least 1, got {value!r}")
    if type(value) not in (int, float):
        raise ValueError(f"{where} must be a number, got {value!r}")
    return kind(value)


def _switch(file: Path, given: dict, field: str) -> bool:
    value = given.get(field, False)
    if type(value) is not bool:
        raise ValueError(f"{file}: {field} must be true or false, got {value!r}")
    return value
