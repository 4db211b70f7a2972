"""Folders of weights: written and read with the same bits, whole and in shards; what is damaged is named."""
import dataclasses
import json
import re

import pytest
import torch
from decoders import DEVICES, SHAPES, prompt, relative_error, run
from safetensors.torch import load_file, save_file

from kernels.bits import same_bits
from kernels.model.folder import INDEX, WHOLE, load, save
from kernels.model.llama import Llama

HEAD, EMBEDDING, QUERY = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"


def saved(folder, shape="llama", dtype=torch.bfloat16) -> Llama:
    model = Llama(SHAPES[shape], dtype=dtype, device="cpu", seed=6)
    save(model, folder)
    return model


def change(folder, **tensors):
    """Replace tensors of the whole file, or take them out."""
    found = load_file(folder / WHOLE) | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: t for name, t in found.items() if t is not None}, folder / WHOLE)


def shard(folder, shards=3):
    """The whole file cut into shards with an index."""
    tensors, where = load_file(folder / WHOLE), {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    (folder / WHOLE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def same_weights(a: Llama, b: Llama) -> bool:
    return same_bits(a.weights(), b.weights())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_saved_is_loaded(shape, sharded, device, tmp_path):
    model = saved(tmp_path, shape)
    if sharded:
        shard(tmp_path)
    found = load(tmp_path, device=device)
    assert same_weights(found, model) and found.dtype == torch.bfloat16 and found.device.type == device
    assert dataclasses.replace(found.config, name="tiny") == model.config and found.config.name == tmp_path.name


def test_the_same_weights_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        saved(tmp_path / name)
    for file in ("config.json", WHOLE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", WHOLE]


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_what_is_saved_and_we_read_what_it_saves(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = saved(tmp_path / "ours", shape, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    tokens = prompt(1, 40)
    with torch.no_grad():
        assert relative_error(run(model, tokens), theirs(tokens).logits) < 4e-6
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert same_weights(load(tmp_path / "theirs", device="cpu"), model)


def test_weights_are_rounded_once_to_the_models_dtype(tmp_path):
    model = saved(tmp_path, dtype=torch.float32)
    found = load(tmp_path, dtype=torch.bfloat16, ops="invariant", device="cpu")
    assert same_bits(found.head, model.head.bfloat16()) and found.ops_name == "invariant"
    assert same_bits(found.layers[0].qkv, model.layers[0].qkv.bfloat16())


def test_old_rotary_tables_and_a_head_like_the_tied_embedding_are_passed_over(tmp_path):
    model = saved(tmp_path, "tied")
    change(tmp_path, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), HEAD: model.head.clone()})
    assert same_weights(load(tmp_path, device="cpu"), model)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_file_cut_short_is_named(keep, tmp_path):
    saved(tmp_path)
    content = (tmp_path / WHOLE).read_bytes()
    (tmp_path / WHOLE).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / WHOLE))} is damaged or cut short"):
        load(tmp_path)


def test_a_damaged_shard_is_named(tmp_path):
    saved(tmp_path)
    name = shard(tmp_path)[QUERY]
    (tmp_path / name).write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load(tmp_path)


@pytest.mark.parametrize("name, tensor, error, message", [
    (QUERY, None, ValueError, f"lacks the tensor {QUERY}"),
    (QUERY, torch.zeros(63, 64), ValueError,
     rf"model.safetensors: {QUERY} has shape \(63, 64\), and config.json asks for \(64, 64\)"),
    (QUERY, torch.zeros(64), ValueError, rf"{QUERY} has shape \(64,\)"),
    (QUERY, torch.zeros(64, 64, dtype=torch.int8), TypeError, f"{QUERY} is stored as I8, and only BF16, F16, F32"),
    (QUERY, torch.zeros(64, 64, dtype=torch.float64), TypeError, "stored as F64"),
    (QUERY.replace("weight", "bias"), torch.zeros(64), ValueError,
     "model.safetensors holds model.layers.1.self_attn.q_proj.bias, which no weight"),
    ("model.layers.2.input_layernorm.weight", torch.zeros(64), ValueError, "which no weight of such a model is made"),
    (EMBEDDING, torch.zeros(255, 64), ValueError, rf"{EMBEDDING} has shape \(255, 64\)"),
    (HEAD, None, ValueError, f"config.json: tie_word_embeddings is false, and .* holds no {HEAD}"),
])
def test_a_tensor_that_is_not_the_models_is_named(name, tensor, error, message, tmp_path):
    saved(tmp_path)
    change(tmp_path, **{name: tensor})
    with pytest.raises(error, match=message):
        load(tmp_path)


def test_a_head_beside_a_tied_embedding_must_be_the_embedding(tmp_path):
    model = saved(tmp_path, "tied")
    change(tmp_path, **{HEAD: -model.embedding})
    with pytest.raises(ValueError, match=f"tie_word_embeddings is true, and .*model.safetensors holds a {HEAD} that"):
        load(tmp_path)


def test_a_norm_that_a_llama_has_not_is_named(tmp_path):
    """A Qwen3's weights under a Llama's config."""
    saved(tmp_path, "qwen3")
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds model.layers.0.self_attn.k_norm.weight, which no weight"):
        load(tmp_path)


@pytest.mark.parametrize("edit, message", [
    (lambda where: where | {QUERY: "gone.safetensors"}, f"the shard gone.safetensors for {QUERY}, which is missing"),
    (lambda where: where | {QUERY: "../x.safetensors"}, "'../x.safetensors' for .* which is no name of a file beside"),
    (lambda where: {k: v for k, v in where.items() if k != QUERY}, f"lacks the tensor {QUERY}"),
    (lambda where: where | {QUERY: where[HEAD]} if where[QUERY] != where[HEAD] else where | {QUERY: where[EMBEDDING]},
     f"lacks the tensor {QUERY}: File does not contain"),
    (lambda where: list(where), "weight_map must map tensors to files, got list"),
    (lambda where: dict.fromkeys(where, 1), "weight_map must map tensors to files"),
])
def test_an_index_that_does_not_fit_is_named(edit, message, tmp_path):
    saved(tmp_path)
    where = shard(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": edit(where)}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_damaged_index_is_named(tmp_path):
    saved(tmp_path)
    shard(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ValueError, match=f"{INDEX} is damaged"):
        load(tmp_path)


def test_a_folder_without_weights_is_said(tmp_path):
    saved(tmp_path)
    (tmp_path / WHOLE).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds neither {WHOLE} nor {INDEX}"):
        load(tmp_path)


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    model = saved(tmp_path)
    before = (tmp_path / WHOLE).read_bytes()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("kernels.model.folder.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path)
    assert (tmp_path / WHOLE).read_bytes() == before
