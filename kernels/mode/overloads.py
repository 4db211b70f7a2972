"""The overloads that write: mm.out, addmm_ and their like, made of the rules whose results they take."""
from __future__ import annotations

from .elements import COMPLEX, EVERY, OF_A_NUMBER, ONE, PAIRS
from .names import op_of
from .switch import RULES, rule

OUT = {"mm.out": "mm", "addmm.out": "addmm", "bmm.out": "bmm", "baddbmm.out": "baddbmm", "mv.out": "mv",
       "addmv.out": "addmv", "dot.out": "dot", "vdot.out": "vdot", "addbmm.out": "addbmm",
       "_addmm_activation.out": "_addmm_activation", "mm.dtype_out": "mm.dtype", "bmm.dtype_out": "bmm.dtype",
       "addmm.dtype_out": "addmm.dtype", "baddbmm.dtype_out": "baddbmm.dtype", "sum.IntList_out": "sum.dim_IntList",
       "sum.out": "sum", "mean.out": "mean.dim", "mean.dtype_out": "mean", "_softmax.out": "_softmax",
       "_log_softmax.out": "_log_softmax", "embedding_dense_backward.out": "embedding_dense_backward",
       "cumsum.out": "cumsum", "prod.out": "prod", "prod.int_out": "prod.dim_int", "index_add.out": "index_add",
       "scatter_add.out": "scatter_add", "linalg_vector_norm.out": "linalg_vector_norm",
       "var.correction_out": "var.correction", "std.correction_out": "std.correction"}
IN_PLACE = {"addmm_": "addmm", "baddbmm_": "baddbmm", "addmv_": "addmv", "addbmm_": "addbmm", "cumsum_": "cumsum"}
_ELEMENTS_OUT = {name + ("_out" if "." in name else ".out"): name for name in (*ONE, *PAIRS, OF_A_NUMBER)}
_ELEMENTS_IN_PLACE = {"pow_.Scalar": "pow.Tensor_Scalar", "pow_.Tensor": "pow.Tensor_Tensor",
                      **{f"{name}_": name for name in (*ONE, *PAIRS) if "." not in name}}
ON_A_CPU_ALONE = {*EVERY, *COMPLEX, *_ELEMENTS_OUT, *_ELEMENTS_IN_PLACE}
REDUCES = ("sum.IntList_out", "sum.out", "mean.out", "mean.dtype_out")


def _into(name: str, of: str):
    """Compute as `of` does, then write. A result of another dtype or device is PyTorch's to refuse."""
    def call(*arguments, out, **named):
        if name in REDUCES and named.get("dtype") is None:
            named["dtype"] = out.dtype
        result = RULES[of](*arguments, **named)
        if result is NotImplemented or result.dtype != out.dtype or result.device != out.device:
            return NotImplemented
        if out.shape != result.shape:
            out.resize_(result.shape)
        return out.copy_(result)
    return call


def _in_place(of: str):
    def call(self, *arguments, **named):
        result = RULES[of](self, *arguments, **named)
        if result is NotImplemented or result.shape != self.shape or result.dtype != self.dtype:
            return NotImplemented
        return self.copy_(result)
    return call


@rule("native_layer_norm.out")
def _layer_norm_into(*arguments, out0, out1, out2):
    results = RULES["native_layer_norm"](*arguments)
    if results is NotImplemented:
        return results
    for out, result in zip((out0, out1, out2), results, strict=True):
        if out.dtype != result.dtype:
            return NotImplemented
        out.resize_(result.shape).copy_(result)
    return out0, out1, out2


for _name, _of in (OUT | _ELEMENTS_OUT).items():
    if op_of(_name) is not None:
        rule(_name)(_into(_name, _of))
for _name, _of in (IN_PLACE | _ELEMENTS_IN_PLACE).items():
    if op_of(_name) is not None:
        rule(_name)(_in_place(_of))
