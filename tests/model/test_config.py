"""Sizes of decoders, published ones, and config.json in both of its forms; what is not implemented is refused."""
import dataclasses
import json
import re

import pytest

from kernels.model import hf_config
from kernels.model.config import PRESETS, Config, RopeScaling

PUBLISHED = {"llama-3.1-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400, "qwen3-0.6b": 596_049_920,
             "qwen3-8b": 8_190_735_360}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_match_the_published_count(name):
    assert PRESETS[name].parameters == PUBLISHED[name]


def test_the_byte_model_is_small_and_eight_gpus_may_share_it():
    byte = PRESETS["byte"]
    assert byte.vocab_size == 256 and byte.heads == 8 and byte.parameters <= 3_500_000
    assert not byte.tied_embeddings and byte.rope_scaling is None and byte.context == 1024
    assert all(size % 128 == 0 for shape in byte.shapes.values() for size in shape)
    assert dataclasses.replace(byte, shared=8).shared == 8


@pytest.mark.parametrize("change, message", [
    ({"layers": 0}, "layers"), ({"hidden_size": 64.0}, "hidden_size"), ({"vocab_size": True}, "vocab_size"),
    ({"kv_heads": 3}, "heads must be a multiple of kv_heads"), ({"head_dim": 24}, "head_dim"),
    ({"head_dim": 4}, "head_dim"), ({"context": -1}, "context"), ({"norm_eps": 0.0}, "norm_eps"),
    ({"norm_eps": float("nan")}, "norm_eps"), ({"rope_theta": 1.0}, "rope_theta"), ({"shared": 2}, "shared must be 1"),
    ({"shared": True}, "shared"), ({"shared": 8}, "heads must be a multiple of shared = 8, got 4"),
    ({"shared": 8, "heads": 8, "intermediate_size": 100}, "intermediate_size must be a multiple of shared"),
])
def test_a_bad_config_names_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["tiny"], **change)


@pytest.mark.parametrize("change, message", [
    ({"factor": 0.5}, "factor"), ({"original_context": 0}, "original_context"),
    ({"low_frequency_factor": 4.0}, "low_frequency_factor"), ({"low_frequency_factor": 0.0}, "low_frequency_factor"),
])
def test_a_bad_rope_scaling_names_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**change)


# config.json

def read(folder, given) -> Config:
    (folder / "config.json").write_text(given if isinstance(given, str) else json.dumps(given))
    return Config.from_folder(folder)


def json_of(name="llama-3.1-8b", **changes) -> dict:
    given = {**hf_config.written(PRESETS[name], "bfloat16"), **changes}
    return {field: value for field, value in given.items() if value is not ...}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("shared", [1, 8])
def test_what_is_written_is_read(name, shared, tmp_path):
    config = PRESETS[name]
    if config.heads % shared == 0:
        config = dataclasses.replace(config, shared=shared)
    assert dataclasses.replace(read(tmp_path, hf_config.written(config, "float32")), name=name) == config


def test_the_folder_gives_the_name(tmp_path):
    assert read(tmp_path, json_of()).name == tmp_path.name


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-8b"])
def test_both_forms_of_the_rotation_are_read(name, tmp_path):
    given = json_of(name)
    parameters = {"rope_theta": given.pop("rope_theta"), **(given.pop("rope_scaling") or {"rope_type": "default"})}
    assert dataclasses.replace(read(tmp_path, given | {"rope_parameters": parameters}), name=name) == PRESETS[name]
    older = {"type" if k == "rope_type" else k: v for k, v in parameters.items() if k != "rope_theta"}
    given |= {"rope_theta": parameters["rope_theta"], "rope_scaling": older}
    assert dataclasses.replace(read(tmp_path, given), name=name) == PRESETS[name]


def test_fields_left_out_are_what_transformers_takes_them_for(tmp_path):
    given = json_of(num_key_value_heads=..., head_dim=..., attention_bias=..., hidden_act=..., tie_word_embeddings=...)
    config = read(tmp_path, given)
    assert (config.kv_heads, config.head_dim, config.tied_embeddings) == (32, 128, False)
    assert read(tmp_path, json_of("qwen3-0.6b", head_dim=...)).head_dim == 128, "not hidden_size / heads = 64"


NOT_IMPLEMENTED = [
    ({"architectures": ["MistralForCausalLM"]}, "architectures must be one of LlamaForCausalLM, Qwen3ForCausalLM"),
    ({"architectures": ...}, "architectures must be"), ({"architectures": "LlamaForCausalLM"}, "architectures must be"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu' is implemented"),
    ({"attention_bias": True}, "attention_bias is True"), ({"mlp_bias": True}, "mlp_bias is True"),
    ({"use_sliding_window": True}, "use_sliding_window is True"), ({"sliding_window": 4096}, "sliding_window is 4096"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
    ({"pretraining_tp": 2}, "pretraining_tp is 2"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling has rope_type 'yarn', and only"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type 'linear'"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_parameters has rope_type 'dynamic'"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
]
DAMAGED = [
    ({"hidden_size": ...}, "hidden_size is missing"), ({"hidden_size": "4096"}, "hidden_size must be a whole number"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, got 0"),
    ({"num_attention_heads": True}, "num_attention_heads must be"), ({"rms_norm_eps": ...}, "rms_norm_eps is missing"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"), ({"rms_norm_eps": 0}, "norm_eps must be a number"),
    ({"num_key_value_heads": 5}, "heads must be a multiple of kv_heads"), ({"rope_theta": ...}, "rope_theta is miss"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"), ({"shared": 4}, "shared must be 1"),
    ({"head_dim": ..., "hidden_size": 4100}, "head_dim is missing, and hidden_size = 4100 is no multiple of"),
    ({"head_dim": 96}, "head_dim must be a power of two"), ({"rope_scaling": "llama3"}, "rope_scaling must be"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling low_freq_factor is missing"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 0.5, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 8192}}, "rope_scaling: factor and original_context"),
]


@pytest.mark.parametrize("change, message", NOT_IMPLEMENTED + DAMAGED)
def test_what_is_not_implemented_or_damaged_names_file_and_field(change, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'config.json'))}: .*{message}"):
        read(tmp_path, json_of(**change))


@pytest.mark.parametrize("text, message", [("{", "is damaged"), ("[]", "must hold a JSON object, got list"),
                                           ("", "is damaged")])
def test_a_file_that_is_no_config_is_said(text, message, tmp_path):
    with pytest.raises(ValueError, match=f"config.json {message}"):
        read(tmp_path, text)


def test_a_missing_config_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        Config.from_folder(tmp_path)
