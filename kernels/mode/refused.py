"""Ops that the atlas has seen move their bits and that have no order here: refused, or warned of, by name.

`KNOWN` says which of ATen's ops a row of the atlas (data/*/atlas.csv) ran, and when a call is of that kind. Beside it
stand whole layers in one kernel. Other kinds are in refused_draws.py (random numbers) and refused_libraries.py (linear
algebra, transforms, sparse and quantized ops).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .names import op_of
from .switch import Unsupported, rule


@dataclass(frozen=True)
class Mover:
    """Of one row of the atlas: ATen's ops, and whether a call's bits may move; always, by default."""

    ops: tuple[str, ...]
    moves: Callable[..., bool] = lambda *arguments, **named: True


def _floats(x, *arguments, **named) -> bool:
    return x.is_floating_point() or x.is_complex()


def _on_gpu(x, *arguments, **named) -> bool:
    return _floats(x) and not x.is_cpu


def _adds(x, indices, values, accumulate=False, *rest, **named) -> bool:
    return accumulate and _floats(x)


def _weighs(x, weights=None, *rest) -> bool:
    return weights is not None


def _drops(x, p, train=True, **named) -> bool:
    return train is not False and p > 0


def _trains(x, weight, bias, *rest, **named) -> bool:
    return any(value is True for value in rest[:3])


KNOWN = {
    "conv1d": Mover(("convolution", "convolution_overrideable", "convolution_backward"), _floats),
    "cumsum": Mover(("cumsum",), _on_gpu),
    "prod": Mover(("prod", "prod.dim_int"), _floats),
    "var": Mover(("var.correction", "std.correction", "var_mean.correction", "std_mean.correction"), _floats),
    "vector_norm": Mover(("linalg_vector_norm",), _floats),
    "index_add": Mover(("index_add", "index_add_"), _floats),
    "index_put[accumulate]": Mover(("index_put", "index_put_", "_index_put_impl_"), _adds),
    "scatter_add": Mover(("scatter_add", "scatter_add_"), _floats),
    "scatter_reduce[mean]": Mover(("scatter_reduce.two", "scatter_reduce_.two"), _floats),
    "bincount[weights]": Mover(("bincount",), _weighs),
    "dropout": Mover(("native_dropout",), _drops),
    "multinomial": Mover(("multinomial",)),
    "batch_norm[training]": Mover(("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"), _trains),
}
RECURRENT = {"mkldnn_rnn_layer": "mkldnn", "mkldnn_rnn_layer_backward": "mkldnn", "_cudnn_rnn": "cudnn",
             "_cudnn_rnn_backward": "cudnn"}
PACKED = tuple(f"_{kernel}_attention_{way}" for kernel in ("flash", "efficient", "cudnn") for way in
               ("forward", "backward"))


def _refusal(row: str, mover: Mover) -> Callable:
    def refuse(*arguments, **named):
        if not mover.moves(*arguments, **named):
            return NotImplemented
        raise Unsupported(f"moves its bits with the batch, or from run to run ({row} in the atlas), and has no order "
                          "here")
    return refuse


def _several(*arguments, **named):
    raise Unsupported("is a whole layer in one kernel, whose sums have no order here: turn it off by "
                      "torch.backends.mha.set_fastpath_enabled(False)")


def _recurrent(library: str) -> Callable:
    def refuse(*arguments, **named):
        raise Unsupported("is a whole layer in one kernel, whose sums have no order here: turn it off by "
                          f"torch.backends.{library}.flags(enabled=False)")
    return refuse


@rule("linalg_matrix_exp")
def _matrix_exp(self):
    raise Unsupported("takes other steps for one matrix than for several, and has no order here")


def _packed(*arguments, **named):
    raise Unsupported("is attention of sequences behind each other, whose sums have no order here")


for _name in PACKED:
    if op_of(_name) is not None:
        rule(_name)(_packed)
for _row, _mover in KNOWN.items():
    rule(*_mover.ops)(_refusal(_row, _mover))
for _name, _library in RECURRENT.items():
    rule(_name)(_recurrent(_library))
rule("_transformer_encoder_layer_fwd", "_native_multi_head_attention")(_several)
