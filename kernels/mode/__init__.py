"""A model that nobody rewrote, made batch-invariant: PyTorch's own ops, taken to this suite's where they land.

    with batch_invariant():
        model(**inputs)

A key of PyTorch's dispatcher that nothing else uses stands between autograd and the devices' kernels. The rules in this
folder are registered there once; the mode only tells the thread whether the key counts. So nothing of PyTorch is
replaced, other threads notice nothing, and leaving the mode, by an exception too, is the end of it. Ops without a rule
cost nothing. Composite ops (einsum, cross_entropy) are caught in what they are made of, gradients in the backward
passes' own products and sums, casts of autocast before they arrive here. Of linear, matmul and attention PyTorch would
choose kernels by how their tensors lie: a second key above autograd sees them whole.

    switch      the keys, the thread's state, what a refusal is     products    mm and its like
    reductions  sums, softmax, norms and their gradients            attention   scaled_dot_product_attention
    elements    functions of one number that a CPU's loops move     refused     what moves bits and has no order here
    kept        the short way of a call like one before             composites  whole calls, and their steps
    folded      rows of several dimensions as one product           compiling   what torch.compile traces in the mode
    names       of ops, ATen's and a reader's                       callers     whose call is no row of a batch

switch has its parts in installing (what is registered once) and decorated (the mode as a decorator); composites in
folded, whole_attention and steps; compiling in opaque, compiled_attention, known_attention, compiled_products,
products_together, rounded_norm, norm_fusion and graphs; kept in kept_attention; reductions in seen_softmax. refused
has the ops that the atlas ran, refused_draws random numbers, refused_libraries linear algebra, Fourier transforms,
distances, sparse and quantized ops.

What the batch is: the rows of a product's first factor, the matrices of a batched one, attention's sequences, and of
other ops the rows over which they go. So `W @ x.t()`, whose columns are the batch, may move where `x @ W.t()` does not,
and a sum over a prompt's tokens counts the places that padding on the left takes. Nor is it looked at on a CPU how
products of complex numbers lie, or an image's channels.

On a CUDA GPU the rules call schedules, on a CPU the specifications: the same bits, and slow.
"""
from .switch import MovesBits, Refused, active, batch_invariant

__all__ = ["MovesBits", "Refused", "active", "batch_invariant"]
