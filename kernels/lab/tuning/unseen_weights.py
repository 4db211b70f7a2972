"""Weights that no table of schedules holds, most of them of models that people run, and the token counts of unseen.py.

A layer's query, key and value are one product, and so are its gate and up; "/ 4" is a model cut over four GPUs.
"""
from __future__ import annotations

from ...op import Shape

MODELS = {
    "Llama-3.2-1B": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048)),
    "Llama-3.2-3B": ((5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192)),
    "Llama-3.1-70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "Llama-3.1-70B / 2": ((5120, 8192), (28672, 8192), (8192, 14336)),
    "Llama-3.1-70B / 4": ((2560, 8192), (8192, 2048), (14336, 8192), (8192, 7168)),
    "Qwen2.5-7B": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
    "Qwen3-0.6B": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
    "Qwen3-8B": ((24576, 4096), (4096, 12288)),
    "Qwen3-14B": ((7168, 5120), (5120, 5120), (34816, 5120), (5120, 17408)),
    "Mistral-7B": ((32768, 4096),),
    "Gemma-2-9B": ((3584, 4096), (28672, 3584), (3584, 14336)),
    "gpt-oss-20b": ((5120, 2880), (2880, 4096), (32, 2880)),
    "GPT-2": ((2304, 768), (50257, 768)),
    "others": ((300, 2000), (5003, 4104), (777, 1288), (100, 6000)),
    "other k": ((4100, 2050), (1111, 3001), (3000, 700)),  # k is no multiple of 8
}
TOKENS = (3, 24, 56, 110, 190, 420, 900, 2300)
IN_FLOAT16, FEW_TOKENS = ("Llama-3.2-3B", "Qwen3-8B", "Gemma-2-9B"), (24, 190, 900)

Point = tuple[str, str, int]  # dtype, shape, tokens


def counts(dtype: str) -> tuple[int, ...]:
    """Token counts of a dtype's points."""
    return TOKENS if dtype == "bfloat16" else FEW_TOKENS


def points(dtypes=("float16", "bfloat16")) -> list[Point]:
    """All of a sweep, weight by weight; float16 first, as it is short."""
    weights = {"float16": [w for model in IN_FLOAT16 for w in MODELS[model]],
               "bfloat16": [w for model in MODELS.values() for w in model]}
    return [(dtype, str(Shape(N=n, K=k)), tokens) for dtype in dtypes for n, k in dict.fromkeys(weights[dtype])
            for tokens in counts(dtype)]
