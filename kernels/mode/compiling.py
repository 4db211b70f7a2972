"""torch.compile while the mode is on.

The dispatcher's keys are part of Dynamo's guards, so a function is compiled once outside and once inside. What Inductor
leaves to ATen reaches the rules when it runs. What it would lower or decompose itself, sums and softmax and small
products, is traced as one opaque op for each rule, by a table of decompositions that is handed to this compilation
alone: nothing of Inductor's is changed. Compiled graphs are kept by their code, which the mode is no part of, so
compilations inside neither read nor fill those caches. On a GPU a norm is one op (norm_fusion.py), and so are products
of the same rows (products_together.py): the way to each op takes the host longer than its launch.

A fused kernel rounds after each operation, as eager does, and contracts none, for what is fused follows the sizes.
Where Inductor has another formula for a function of one number (a sigmoid, a remainder), its last bits are Inductor's,
for every batch the same. Ops that take functions (cond, scan) are traced with what these do; of flex_attention Inductor
makes a kernel that has no order here, so its calls are refused. What goes around torch.compile (Inductor's own
`compile`, ahead-of-time packages, AOTAutograd's backends with decompositions) is not asked, and takes orders of its
own.

CUDA graphs (mode="reduce-overhead") hold all of a model whose masks are known when it is compiled (known_attention.py),
and otherwise what is between calls of attention (compiled_attention.py).
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch.utils._pytree import tree_map_only

from . import compiled_attention, known_attention, norm_fusion, products_together, read_masks
from .compiled_products import product
from .elements import COMPLEX, EVERY
from .kept import short
from .names import op_of, space_of
from .opaque import defined, named_as_pytorchs, schema_of
from .switch import RULES, active, guarded, object_to


@cache
def _opaque(name: str) -> Callable:
    """A rule as an op of torch.library, with the schema of the op it stands for and results that are contiguous."""
    if name.startswith("_scaled_dot_product"):
        return compiled_attention.traced(name)
    op = op_of(name)
    kernel = product(name) if name in ("mm", "addmm") else guarded(name, op, RULES[name], short(name))
    kernel, shapes = (named_as_pytorchs(f, op) for f in (kernel, op))

    def run(*arguments, **named):
        found = kernel(*arguments, **named)
        if found.__class__ is torch.Tensor:  # a tree's walk would cost as much as the call
            return found.contiguous()
        return tree_map_only(torch.Tensor, torch.Tensor.contiguous, found)

    def fake(*arguments, **named):
        return tree_map_only(torch.Tensor, lambda t: t.new_empty(t.shape), shapes(*arguments, **named))
    random = torch.Tag.nondeterministic_seeded  # or a checkpoint draws anew in silence
    return defined("aten_" + name.replace(".", "_"), schema_of(op), run, fake, *{random}.intersection(op.tags))


def _decomposition(name: str, before: Callable | None) -> Callable:
    on_cpu_alone, of_complex = name in (*EVERY, *COMPLEX), name in COMPLEX

    def traced(*arguments, **named):
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        if on_cpu_alone and tensors[0].device.type != "cpu" or of_complex and not any(map(torch.is_complex, tensors)):
            return NotImplemented if before is None else before(*arguments, **named)
        return _opaque(name)(*arguments, **named)
    return traced


def decompositions(known: dict) -> dict:
    """Inductor's table `known`, with each rule in its place. Inductor leaves ops of other namespaces than
    ATen's to PyTorch, and they meet their rules as they run."""
    table = dict(known)
    for name in RULES:
        op = op_of(name)
        if op is not None and not _writes(op) and space_of(name) == "aten":
            table[op] = _decomposition(name, known.get(op))
    return table


def _writes(op) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)


def _inner(module: torch.fx.GraphModule, *arguments, **named):
    """Inductor's compilation of a graph, in which a mask is read once, or now, and a norm is one op."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    read_masks.read_once(module)
    known_attention.replace(module, config.triton.cudagraphs)
    if not config.triton.cudagraphs:
        read_masks.name_sources(module)
    norm_fusion.fuse(module)
    products_together.put_together(module)
    own, compiled = _own_kernels(module), compile_fx_inner(module, *arguments, **named)
    return _objected(compiled, own) if own else compiled


_OWN = "flex_attention", "flex_attention_backward", "associative_scan"


def _own_kernels(module: torch.fx.GraphModule) -> list[str]:
    """Those of _OWN in a graph, and in the functions that its ops take: of each, Inductor makes a kernel of its own."""
    nodes = [node for m in module.modules() if isinstance(m, torch.fx.GraphModule) for node in m.graph.nodes]
    names = {str(n.target) for n in nodes if isinstance(n.target, torch._ops.HigherOrderOperator)}
    return [name for name in _OWN if name in names]


def _objected(compiled: Callable, own: list[str]) -> Callable:
    """`compiled`, each call of which is objected to: code that was compiled in one mode may run in a stricter one."""
    def run(inputs):
        for name in own:
            object_to(name, "is compiled to a kernel of its own, whose sums have no order here")
        return compiled(inputs)
    run._boxed_call = True  # type: ignore[attr-defined] - it takes its inputs as one list, as `compiled` does
    return run


def _patches(model: torch.fx.GraphModule) -> dict:
    """Settings of Inductor's for this graph in the mode, of those that this PyTorch has."""
    from torch._inductor import config

    as_eager = dict.fromkeys(("emulate_precision_casts", "eager_numerics.division_rounding",
                              "eager_numerics.disable_ftz"), True)
    kept: dict = dict.fromkeys(("fx_graph_cache", "fx_graph_remote_cache"), False)  # a graph names places in this SEEN
    # no vectors on a CPU: the last few numbers of a loop would take other routines; those kernels are made of vectors
    kept |= {} if _own_kernels(model) else {"cpp.simdlen": 1}
    known = config.get_config_copy()
    return {name: value for name, value in (as_eager | kept).items() if name in known}


def hook() -> None:
    """Let `torch.compile` with Inductor ask, at each compilation, whether the mode is on."""
    wrapper = torch._TorchCompileInductorWrapper
    compile_as_ever = wrapper.__call__

    @wraps(compile_as_ever)
    def compile_graph(self, model, inputs, **named):
        if not active():
            return compile_as_ever(self, model, inputs, **named)
        import torch._functorch.config as functorch
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.decomposition import select_decomp_table

        patches = {**self.config, **(named.get("config_patches") or {}), **_patches(model)}
        with functorch.patch(enable_autograd_cache=False):
            return compile_fx(model, inputs, inner_compile=_inner, config_patches=patches,
                              decompositions=decompositions(select_decomp_table()))
    wrapper.__call__ = compile_graph
