"""A model in a Hugging Face folder: config.json, and model.safetensors or the shards that an index names.

A weight stored as bfloat16, float16 or float32 is rounded once to the model's dtype, or kept as it is; other dtypes
are refused. Names, shapes and dtypes of all tensors are checked before the first weight is made, and then one tensor
at a time is read and copied to its place on the device.
"""
from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import bits, runtime
from ..op import dtype_name
from . import hf_config
from .config import Config
from .llama import Llama
from .weights import Weights, in_transformers, pieces

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_HEAD, _EMBEDDING = in_transformers("head")[0], in_transformers("embedding")[0]


def load(folder: str | Path, *, ops: str = "default", dtype: torch.dtype | None = None, device=None) -> Llama:
    """The model in a folder; `dtype` is by default that of the stored embedding.

    Raises FileNotFoundError for a missing file, ValueError or TypeError that names file and field or file and tensor
    for what is damaged, lacking, too much or of another shape or dtype than config.json says, MemoryError for weights
    larger than the memory that is free.
    """
    folder = Path(folder)
    config, stored = Config.from_folder(folder), _Stored.of(folder)
    stored.check(config)
    dtype = dtype or stored.dtype(_EMBEDDING)
    device = torch.device(device or runtime.device())
    return Llama(config, ops=ops, dtype=dtype, device=device, weights=stored.weights(config, dtype, device))


def save(model: Llama, folder: str | Path) -> None:
    """Write config.json and model.safetensors, which `load` and transformers read. What was there is replaced.

    The same weights give the same bytes. A copy of all weights is held in memory while it writes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, weight in model.weights().items():
        start = 0
        for theirs, rows in pieces(model.config, name):
            tensors[theirs], start = weight[start : start + rows].cpu().clone(), start + rows
    text = json.dumps(hf_config.written(model.config, dtype_name(model.dtype)), indent=2) + "\n"
    _replace(folder / hf_config.FILE, lambda path: path.write_text(text, encoding="utf-8"))
    _replace(folder / WHOLE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    (folder / WHOLE).chmod(0o644)  # safetensors writes for its owner alone


def _replace(path: Path, write) -> None:
    """An interrupted write leaves the file that was there."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


@dataclass(frozen=True)
class _Stored:
    """The tensors of a folder: name -> the file that holds it, and the files that are open."""

    folder: Path
    files: dict[str, Path]
    opened: dict[Path, safe_open] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> _Stored:
        whole, index = folder / WHOLE, folder / INDEX
        if whole.is_file():
            return cls(folder, dict.fromkeys(_opened(whole).keys(), whole))
        if not index.is_file():
            raise FileNotFoundError(f"{folder} holds neither {WHOLE} nor {INDEX}")
        return cls(folder, _indexed(index))

    def file(self, name: str) -> safe_open:
        """The open file that holds a tensor."""
        path = self.files[name]
        if path not in self.opened:
            self.opened[path] = _opened(path)
        return self.opened[path]

    def check(self, config: Config) -> None:
        """Whether these are the tensors of such a model. ValueError or TypeError names file and tensor."""
        wanted = {theirs: (rows, *shape[1:]) for name, shape in config.shapes.items()
                  for theirs, rows in pieces(config, name)}
        if not config.tied_embeddings and _HEAD not in self.files:
            raise ValueError(f"{self.folder / hf_config.FILE}: tie_word_embeddings is false, and {self.folder} holds "
                             f"no {_HEAD}")
        for name, shape in wanted.items():
            self._check_tensor(name, shape)
        self._check_others(config, set(self.files) - set(wanted))

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.files:
            raise ValueError(f"{self.folder} lacks the tensor {name}")
        found = tuple(self._slice(name).get_shape())
        if found != shape:
            raise ValueError(f"{self.files[name]}: {name} has shape {found}, and config.json asks for {shape}")
        self.dtype(name)

    def _check_others(self, config: Config, others: set[str]) -> None:
        """A head beside a tied embedding must be the embedding; what is left over may only be old rotary tables."""
        if config.tied_embeddings and _HEAD in others:
            if not bits.same_bits(self.read(_HEAD), self.read(_EMBEDDING)):
                raise ValueError(f"{self.folder / hf_config.FILE}: tie_word_embeddings is true, and "
                                 f"{self.files[_HEAD]} holds a {_HEAD} that is not {_EMBEDDING}")
            others = others - {_HEAD}
        if unknown := sorted(name for name in others if not name.endswith("rotary_emb.inv_freq")):
            raise ValueError(f"{self.files[unknown[0]]} holds {unknown[0]}, which no weight of such a model is made of")

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in. TypeError unless it is one that is read."""
        stored = self._slice(name).get_dtype()
        if stored not in _DTYPES:
            raise TypeError(f"{self.files[name]}: {name} is stored as {stored}, and only {', '.join(_DTYPES)} are read")
        return _DTYPES[stored]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        try:
            return self.file(name).get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.files[name]}: {name} cannot be read: {error}") from None

    def weights(self, config: Config, dtype: torch.dtype, device: torch.device) -> Weights:
        """(name, shape) -> a weight on the device, its pieces copied to their rows one after another."""
        def weight(name, shape):
            made, start = torch.empty(shape, dtype=dtype, device=device), 0
            for theirs, rows in pieces(config, name):
                made[start : start + rows].copy_(self.read(theirs))
                start += rows
            return made
        return weight

    def _slice(self, name: str):
        try:
            return self.file(name).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self.files[name]} lacks the tensor {name}: {error}") from None


def _opened(file: Path) -> safe_open:
    """A safetensors file, its header read and held against its length. ValueError names a file that is damaged."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from None


def _indexed(index: Path) -> dict[str, Path]:
    """tensor -> shard, as an index says. ValueError for what is no such map, or names a shard that is not there."""
    shards = hf_config.read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index}: weight_map must map tensors to files, got {type(shards).__name__}")
    for name, shard in shards.items():
        if Path(shard).name != shard:
            raise ValueError(f"{index}: weight_map has {shard!r} for {name}, which is no name of a file beside it")
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index}: weight_map names the shard {shard} for {name}, which is missing")
    return {name: index.parent / shard for name, shard in shards.items()}
