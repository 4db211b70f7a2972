"""The vocabulary every op speaks, and what each op in OPS promises the sweeps, widgets and tests."""
import os
import platform
import subprocess
import sys

import pytest
import torch
from common import ROW_OPS
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import OPS, Op
from kernels.bits import ADVERSARIAL, adversarial, digest, same_bits
from kernels.lab import records
from kernels.lab.proofs import digests
from kernels.op import DTYPES, Shape, Work, dtype_name

every_op = pytest.mark.parametrize("op", ROW_OPS.values(), ids=ROW_OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True).filter(lambda n: n != "self")


# Shape


@settings(deadline=None)
@given(st.dictionaries(names, st.integers(0, 10**9) | st.just(True), min_size=1, max_size=5))
def test_a_shape_reads_back_as_it_was_written(sizes):
    shape = Shape(**sizes)
    assert dict(Shape.parse(str(shape))) == sizes
    assert str(Shape.parse(str(shape))) == str(shape) == repr(shape)


def test_a_shape_is_a_mapping_of_sizes_and_switches():
    shape = Shape.parse("D=8192, residual")
    assert (shape["D"], shape["residual"], shape.get("other")) == (8192, True, None)
    assert (len(shape), list(shape), str(shape)) == (2, ["D", "residual"], "D=8192,residual")
    assert Shape.parse(shape) is shape
    assert str(Shape(N=1, K=2)) == "N=1,K=2"


@pytest.mark.parametrize("text", ["", "D=", "D=x", "D=-1", "=4", "D=1,,K=2", "4=D", "D=1.5", "two words"])
def test_text_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="D=8192,residual") as caught:
        Shape.parse(text)
    assert repr(text) in str(caught.value)


def test_a_shape_must_have_the_sizes_that_are_needed():
    shape = Shape.parse("N=1,K=2", "K", "N")
    assert Shape.parse(shape, "K") is shape
    with pytest.raises(ValueError, match="shape must give D=..., got 'E=4'"):
        Shape.parse("E=4", "D")
    with pytest.raises(ValueError, match="shape must give N=... and D=..., got 'K=2,D'"):
        Shape.parse(Shape(K=2, D=True), "N", "K", "D")


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "rms_norm", "mean", "sum"])
@pytest.mark.parametrize("call", ["inputs", "work"])
def test_an_op_names_the_size_it_lacks(name, call):
    with pytest.raises(ValueError, match="shape must give D=..., got 'E=4'"):
        getattr(OPS[name], call)(2, "E=4", torch.float32)
    with pytest.raises(ValueError, match="shape must give K=..., got 'N=4'"):
        getattr(OPS["matmul"], call)(2, "N=4", torch.float32)
    with pytest.raises(ValueError, match="shape must give F=..., got 'E=4'"):
        getattr(OPS["swiglu"], call)(2, "E=4", torch.float32)
    with pytest.raises(ValueError, match="shape must give D=... and context=..., got 'H=4'"):
        getattr(OPS["rotary"], call)(2, "H=4", torch.float32)


def test_dtype_names():
    assert {name: dtype_name(dtype) for name, dtype in DTYPES.items()} == {name: name for name in DTYPES}
    assert set(DTYPES) == {"bfloat16", "float16", "float32"}


# Op


def toy(**changes):
    parts = {name: (lambda *a: a) for name in ("cuda", "python", "triton", "inputs", "work", "schedules", "schedule")}
    return Op(**{"name": "toy", "title": "Toy", "order": "one by one", "per_token": (0, 2), "shapes": ("D=4",), **parts,
                 **changes})


def test_implementations_are_the_three_names_and_the_extras():
    op = toy(extras={"split": max})
    assert list(op.implementations) == ["cuda", "python", "triton", "split"]
    assert op.implementation("split") is max
    assert op.implementation("python") is op.python
    assert list(toy().implementations) == ["cuda", "python", "triton"]


def test_an_unknown_implementation_lists_those_there_are():
    with pytest.raises(ValueError, match="toy has no implementation 'cudnn'; it has cuda, python, triton, split"):
        toy(extras={"split": max}).implementation("cudnn")


def test_an_op_cannot_be_changed():
    with pytest.raises(AttributeError):
        toy().cuda = max
    with pytest.raises(TypeError):
        toy().extras["more"] = max


def test_take_cuts_only_per_token_arguments():
    x, weight, residual = torch.arange(12.0).view(4, 3), torch.ones(3), torch.arange(12.0).view(4, 3) * 2
    rows = torch.tensor([3, 0, 3])
    a, b, c = toy().take((x, weight, residual), rows)
    assert same_bits(a, x[rows]) and b is weight and same_bits(c, residual[rows])
    assert [None if v is None else len(v) for v in toy().take((x, weight, None), slice(1, 2))] == [1, 3, None]


def test_repr_names_the_op():
    assert repr(toy()) == "<Op toy: Toy>"


# every op of the suite

RUNNABLE = {"matmul": ("N=33,K=72", "N=20,K=1200,bias", "N=4,K=4096")}  # a weight of 128256 rows takes a CPU minutes


def shapes_to_run(op):
    """Shapes that a CPU makes inputs for and sums in no time."""
    return RUNNABLE.get(op.name, op.shapes)


def test_ops_are_kept_by_name():
    assert OPS and all(name == op.name and name.isidentifier() for name, op in OPS.items())


@every_op
def test_an_op_explains_itself(op):
    assert op.title and op.order and op.mutates <= set(op.extras)
    assert not {"cuda", "python", "triton"} & set(op.extras)


def tensors_of(arguments):
    """The arguments that are tensors: the others are None, or numbers such as a dim."""
    return tuple(a for a in arguments if isinstance(a, torch.Tensor))


@every_op
def test_shapes_are_written_as_they_read(op):
    assert op.shapes and all(str(Shape.parse(text)) == text for text in op.shapes)


@every_op
@every_dtype
def test_inputs_fit_the_op_and_their_rows_do_not_depend_on_how_many(op, dtype):
    for shape in shapes_to_run(op):
        few, more = op.inputs(3, shape, dtype, seed=5), op.inputs(5, shape, dtype, seed=5)
        assert same_bits(*(tensors_of(a) for a in (few, op.take(more, slice(0, 3)))))
        assert all(few[i] is None or len(few[i]) == 3 for i in op.per_token)
        tensors = tensors_of(few)
        assert {t.dtype for t in tensors if t.is_floating_point()} == {dtype}
        other = op.inputs(3, shape, dtype, seed=6)
        assert not same_bits(few[op.per_token[0]], other[op.per_token[0]])
        assert all(t.device == torch.device("cpu") for t in tensors)


@every_op
@every_dtype
def test_work_counts_what_must_cross_memory_once(op, dtype):
    """Every input read once and every output written once, found by running the op."""
    for shape in shapes_to_run(op):
        inputs = op.inputs(2, shape, dtype)
        outputs = op.python(*inputs)
        tensors = tensors_of((*inputs, *(outputs if isinstance(outputs, tuple) else (outputs,))))
        work = op.work(2, shape, dtype)
        assert isinstance(work, Work)
        assert work.bytes == sum(t.numel() * t.element_size() for t in tensors)
        assert 0 < work.flops < op.work(3, shape, dtype).flops


@pytest.mark.parametrize(("name", "shape", "flops"), [
    ("rms_norm", "D=64", 4 * 64), ("rms_norm", "D=64,residual", 5 * 64), ("softmax", "D=64", 5 * 64),
    ("log_softmax", "D=64", 4 * 64), ("sum", "D=64", 63), ("mean", "D=64", 64), ("matmul", "N=8,K=64", 2 * 8 * 64),
    ("rotary", "H=4,D=8,context=9", 3 * 32), ("swiglu", "F=64", 5 * 64)])
def test_operations_are_counted_by_hand(name, shape, flops):
    assert OPS[name].work(3, shape, torch.float32).flops == 3 * flops


@every_op
@every_dtype
def test_the_schedule_of_choice_is_among_those_that_are_tested(op, dtype):
    for shape in op.shapes:
        schedules = [str(s) for s in op.schedules(shape, dtype)]
        assert len(set(schedules)) == len(schedules)
        for tokens in (1, 2, 7, 64, 500, 4096, 100_000):
            assert op.schedule(tokens, shape, dtype) in schedules


@every_op
@pytest.mark.gpu
def test_inputs_are_the_same_on_a_gpu(op):
    for shape in shapes_to_run(op):
        for dtype in DTYPES.values():
            here, there = (op.inputs(9, shape, dtype, device, seed=3) for device in ("cpu", "cuda"))
            for a, b in zip(here, there, strict=True):
                assert b.is_cuda and same_bits(a, b) if isinstance(a, torch.Tensor) else a == b


# what other machines recorded

CAPABILITIES = {"": torch.backends.cpu.get_cpu_capability()}
if platform.machine().lower() in ("x86_64", "amd64"):
    CAPABILITIES |= {"avx2": "AVX2", "default": "DEFAULT"}


SHARES = {"": 1, "avx2": 8, "default": 8}  # every n-th digest is redone: all with the code path that this CPU takes


@pytest.fixture(scope="module")
def redone():
    """capability -> (exit status, printed): recorded digests redone with each of ATen's CPU code paths."""
    running = {}
    for name in CAPABILITIES:
        command = [sys.executable, "-m", "kernels", "digests", "--check", "--every", str(SHARES[name])]
        path = {"ATEN_CPU_CAPABILITY": name} if name else {}
        running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                         cwd=records.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **path})
    return {name: (process.communicate()[0], process.returncode) for name, process in running.items()}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_recorded_digest_is_redone_on_this_cpu(redone, capability):
    """No machine recorded is a failure, not a skip: without a record there is nothing to prove."""
    assert records.machines(digests.DIGESTS.file), "record one on a GPU: python -m kernels digests --out data"
    printed, status = redone[capability]
    assert status == 0, printed
    every = SHARES[capability]
    count = sum(len(records.load(digests.DIGESTS, machine)[::every])
                for machine in records.machines(digests.DIGESTS.file)) + len(digests.quick_points()[::every])
    assert count > 700 // every
    assert f"{count} of {count} digests" in printed and f"({CAPABILITIES[capability]})" in printed


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "mean"])
def test_a_cpu_redoes_thousands_of_a_gpus_rows(name):
    points = [r for _, r in digests.sweep_points() if r.op == name and r.dtype == "bfloat16" and r.tokens == 2048]
    narrowest = min(points, key=lambda r: int(r.shape.removeprefix("D=")))
    assert digests.redo(narrowest) == narrowest.digest


def test_a_cpu_redoes_the_sums_of_several_gpus():
    points = [r for _, r in digests.sweep_points() if r.op == "all_reduce"]
    assert len(points) > 10 and all("gpus=" in r.shape for r in points)
    assert {r for r in points if digests.redo(r) != r.digest} == set()


def many_rows():
    for machine in records.machines(digests.DIGESTS.file):
        table = records.load(digests.DIGESTS, machine)
        assert table["digest"].str.fullmatch("[0-9a-f]{64}").all()
        yield machine, table[(table["rows"] >= 2000) & (table["input"] == "portable")]


def test_a_gpu_recorded_digests():
    machines = records.machines(digests.DIGESTS.file)
    assert machines, "record one on a GPU: python -m kernels digests --out data"
    assert any((records.load(digests.DIGESTS, m)["implementation"] == "triton").all() for m in machines)


@pytest.mark.parametrize("op", [*ROW_OPS, "rotary"])
def test_a_gpu_recorded_thousands_of_rows(op):
    """On each machine that recorded the op at all: one that is not at hand cannot record a new op."""
    recorded = [(machine, many[many["op"] == op]) for machine, many in many_rows() if (many["op"] == op).any()]
    assert recorded
    for machine, many in recorded:
        for dtype in ("bfloat16", "float32"):
            assert many[many["dtype"] == dtype]["shape"].nunique() >= 2, (machine, op, dtype)


@pytest.mark.parametrize("op", digests.QUERIES)
def test_a_gpu_recorded_attention_and_its_cases_are_named_once(op):
    cases = set(digests.cases(OPS[op]))
    assert len(cases) == len(list(digests.cases(OPS[op]))) == 8
    rows = records.load(digests.DIGESTS, "h200")
    mine = rows[rows.op == op]
    assert {digests.Case(r.op, r.dtype, r.shape, r.rows, r.seed, r.input) for r in mine.itertuples()} == cases


SMALL = digests.Case("rms_norm", "bfloat16", "D=100,residual", 9, 4, "wide")


def test_a_digest_row_has_the_columns_of_its_table(tmp_path):
    row = digests.measured(SMALL, "cpu")
    assert set(row) == set(digests.DIGESTS.columns) and row["implementation"] == "python"
    digests.DIGESTS.merge(tmp_path / "machine", [row])
    assert digests.check(tmp_path) == (1, [])
    x, weight, residual = digests.arguments(SMALL)
    assert (x.shape, weight.shape, residual.shape) == ((9, 100), (100,), (9, 100))
    assert same_bits(residual, adversarial("wide", 9, 100, torch.bfloat16, seed=6))


def test_a_wrong_digest_is_noticed(tmp_path):
    """Inverse test: one digit changed in the record is one line in the report."""
    row = digests.measured(SMALL, "cpu")
    altered = row["digest"][:-1] + ("0" if row["digest"][-1] != "0" else "1")
    digests.DIGESTS.merge(tmp_path / "machine", [{**row, "digest": altered}, {**row, "seed": 5}])
    count, wrong = digests.check(tmp_path)
    assert count == 2 and len(wrong) == 2
    assert any(f"D=100,residual 9 4 wide: recorded {altered}, here {row['digest']}" in line for line in wrong)
    assert digests.main(["--check", "--out", str(tmp_path)]) == 1


def swept(folder, recorded):
    """A GPU's token sweep of one small point."""
    row = dict.fromkeys(records.TOKEN_SWEEP.columns, 1.0) | {
        "op": "mean", "implementation": "triton", "dtype": "float32", "shape": "D=33", "tokens": 5, "clock": "cold",
        "same_bits": True, "digest": recorded, "schedule": "", "recorded_at": "", "source": "0" * 12}
    records.TOKEN_SWEEP.merge(folder, [row])
    (folder / "machine.json").write_text("{}")


@pytest.mark.parametrize("place", [0, 7, 15])
def test_one_changed_digit_of_a_sweep_is_noticed(place, tmp_path, capsys):
    right = digest(OPS["mean"].python(*OPS["mean"].inputs(5, "D=33", torch.float32)))[:16]
    swept(tmp_path / "h200", right)
    assert digests.main(["--check", "--out", str(tmp_path)]) == 0
    assert "1 of 1 digests reproduced" in capsys.readouterr().out
    wrong = right[:place] + ("0" if right[place] != "0" else "1") + right[place + 1:]
    swept(tmp_path / "h200", wrong)
    assert digests.main(["--check", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"h200 mean float32 D=33 5 tokens: recorded {wrong}, here {right}" in printed
    assert "0 of 1 digests reproduced" in printed


@pytest.mark.parametrize("place", [0, 31, 63])
def test_one_changed_digit_of_a_digest_is_noticed(place, tmp_path):
    row = digests.measured(SMALL, "cpu")
    digests.DIGESTS.merge(tmp_path / "machine", [row])
    assert digests.main(["--check", "--out", str(tmp_path)]) == 0
    wrong = row["digest"][:place] + ("0" if row["digest"][place] != "0" else "1") + row["digest"][place + 1:]
    digests.DIGESTS.merge(tmp_path / "machine", [{**row, "digest": wrong}])
    assert digests.main(["--check", "--out", str(tmp_path)]) == 1


def test_nothing_recorded_is_not_a_success(tmp_path):
    assert digests.main(["--check", "--out", str(tmp_path)]) == 1


@every_op
def test_every_case_is_named_once(op):
    made = list(digests.cases(op))
    assert len(set(made)) == len(made)
    assert {c.dtype for c in made} == set(DTYPES) and {c.input for c in made} == {"portable", *ADVERSARIAL}
