"""How the matrix product is called."""
from __future__ import annotations

from ...call import Call
from . import gradients
from . import order as orders
from .plan import Plan
from .pointer import pointer_kernel
from .product import product_of
from .schedule import Schedule
from .steps import steps
from .tuning import watched


class _Matmul(Call):
    """A schedule of choice: the arguments, results and bits of the specification, as fast as we can make it.

    float16 and bfloat16 have its bits on a Hopper GPU. Older tensor cores add in another way, which is warned about.
    """

    name = "matmul"
    parameters = "Tensor x, Tensor weight, Tensor? bias=None, int[]? order=None"
    Schedule, kernel = Schedule, pointer_kernel

    def check(self, x, weight, bias=None, order=None):
        orders.check_call(x, weight, bias, order)

    def outputs(self, x, weight, bias, order):
        return (x.new_empty(*x.shape[:-1], weight.shape[0]),)

    def differentiate(self, x, weight, bias, order):
        return gradients.Linear.apply(x, weight, bias, order, self.triton)

    def steps(self, schedule, x, weight, bias, order):
        return steps(schedule, product_of(x, weight, bias, order))

    def make_plan(self, arguments, schedule):
        plan = Plan(*arguments, schedule)
        return plan if plan.forced else watched(plan)


CALL = _Matmul()
gradients.register(CALL.custom)
