"""What every op's call shares: checks, plans kept by shape, and the launch, with a kernel that only takes notes."""
from types import SimpleNamespace

import pytest
import torch

from kernels import launch, runtime
from kernels.bits import same_bits
from kernels.call import Plans, check_tensors
from kernels.launch import Launch, Step, compiled
from kernels.op import DTYPES
from kernels.runtime import tl, triton


def test_plans_are_kept_by_their_key():
    plans = Plans()
    assert plans.get("a") is None
    assert plans.keep("a", "the plan") == "the plan" == plans.get("a")


def test_ever_new_shapes_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(Plans, "LARGEST", 8)
    plans = Plans()
    for key in range(100):
        plans.keep(key, key)
        assert len(plans) <= 8 and plans.get(key) == key


# checks

ONE = torch.ones(3)


@pytest.mark.parametrize(("tensors", "error", "message"), [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": ONE, "weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    ({"x": ONE.double()}, TypeError, "x must be one of bfloat16, float16, float32, got torch.float64"),
    ({"x": ONE.to_sparse()}, TypeError, "x must be a strided tensor, got layout torch.sparse_coo"),
    ({"x": ONE, "weight": ONE.half()}, TypeError, "weight must have x's dtype torch.float32, got torch.float16"),
    ({"x": ONE, "y": ONE.to("meta")}, ValueError, "y must be on x's device cpu, got meta"),
    ({"q": ONE.to("meta")}, ValueError, "q must be on a CPU or a CUDA GPU, got meta"),
])
def test_a_bad_tensor_is_named(tensors, error, message):
    with pytest.raises(error, match=message):
        check_tensors(**tensors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_good_tensors_pass(dtype):
    check_tensors(x=ONE.to(dtype), weight=torch.zeros(2, 2, dtype=dtype).t())


# the launch


@pytest.fixture
def notes(monkeypatch):
    """A GPU 0 of notes: what was compiled, and what was launched on which device."""
    taken = {"compiled": [], "launched": [], "device": 0}

    class Noted:
        def __init__(self, fn, grid, examples, arguments, **options):
            aligned = tuple(t.data_ptr() % 16 == 0 for t in examples)
            self.what = (fn, grid, aligned, tuple(t.dtype for t in examples), arguments)
            taken["compiled"].append((self.what, options))

        def __call__(self, stream, *pointers):
            taken["launched"].append((self.what[2], taken["device"], stream, pointers))

    class Device:
        def __init__(self, index):
            self.index, self.before = index, taken["device"]

        def __enter__(self):
            taken["device"] = self.index

        def __exit__(self, *_):
            taken["device"] = self.before

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **kwargs: empty(*size, **kwargs))
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(launch, "Compiled", Noted)
    monkeypatch.setattr(launch, "has_pdl", lambda index: index == 0)
    monkeypatch.setattr(launch, "current_device", lambda: taken["device"])
    monkeypatch.setattr(launch, "current_stream", lambda index: f"stream of {index}")
    return taken


def launch_of(index=0, **options):
    return Launch(Step("fn", 7, {"x_ptr": torch.bfloat16, "y_ptr": torch.float32}, {"n": 5, "factor": 0.5},
                       {"BLOCK": 1024, "EVEN": True}, options), index)


def test_a_kernel_is_compiled_once_and_launched_with_its_pointers(notes):
    run = launch_of(num_warps=8)
    for x in (32, 64, 96):
        run(x, x, 256)
    (what, options), = notes["compiled"]
    assert what == ("fn", 7, (True, True), (torch.bfloat16, torch.float32), (5, 0.5, 1024, True, True))
    assert options == {"enable_fp_fusion": False, "launch_pdl": True, "num_warps": 8}
    assert notes["launched"] == [((True, True), 0, "stream of 0", (x, 256)) for x in (32, 64, 96)]


def test_each_alignment_has_its_own_code(notes):
    run = launch_of()
    pointers = [(32, 256), (34, 256), (16, 32), (38, 260), (40, 16), (48, 256), (34, 272)]
    for x, y in pointers:
        run(x | y, x, y)
    assert [what[2] for what, _ in notes["compiled"]] == [(True, True), (False, True), (False, False)]
    assert [(aligned, given) for aligned, _, _, given in notes["launched"]] == [
        ((x % 16 == 0, y % 16 == 0), (x, y)) for x, y in pointers]


def test_code_for_a_misaligned_pointer_does_not_serve_the_aligned(notes):
    run = launch_of()
    run(34, 34, 256)
    run(32, 32, 256)
    assert [aligned for aligned, *_ in notes["launched"]] == [(False, True), (True, True)]


def test_another_gpu_is_current_during_the_launch_and_not_after(notes):
    launch_of(1)(32, 32, 256)
    assert notes["launched"] == [((True, True), 1, "stream of 1", (32, 256))] and notes["device"] == 0
    (what, options), = notes["compiled"]
    assert what[4][-1] is False and options["launch_pdl"] is False  # GPU 1 of the notes is an older one


# what Triton's launcher hands to its function in C


def launcher(function, signature, meta=None):
    """Triton's own, over another function in C."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    made = object.__new__(driver.CudaLauncher)
    made.num_ctas, made.launch = 1, driver.wrap_handle_tensordesc(function, signature, meta)
    made.launch_cooperative_grid, made.launch_pdl = False, True
    made.global_scratch_size = made.profile_scratch_size = 0
    made.global_scratch_align = made.profile_scratch_align = 1
    made.arg_annotations, made.kernel_signature = "annotations", b"signature"
    return made


def compiled_by(run, version, monkeypatch):
    """A kernel with this launcher, bound to 7 programs and the constants 64 and True."""
    kernel = SimpleNamespace(run=run, function=99, packed_metadata=(4, 1, 0), _init_handles=lambda: None,
                             metadata=SimpleNamespace(tensordesc_meta=["a", "b"]))
    monkeypatch.setattr(runtime.triton, "__version__", version, raising=False)  # a stand-in has none
    fn = SimpleNamespace(warmup=lambda *_, **__: kernel)
    return runtime.Compiled(fn, 7, (), (64, True))


DESCRIBED = {0: "tensordesc<bf16[16,64]>", 1: "constexpr", 2: "tensordesc<bf16[32,64]>", 3: "*bf16"}


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="the launcher is Triton's")
@pytest.mark.parametrize("signature, arguments", [({0: "*fp32", 1: "*fp32"}, (16, 32)),
                                                  (DESCRIBED, ("x", None, "w", 48))])
def test_a_launch_says_what_tritons_launcher_would_say(signature, arguments, monkeypatch):
    from triton.backends.nvidia import driver

    def flat(arguments):
        return [tuple(a) if isinstance(a, list) else a for a in arguments]

    monkeypatch.setattr(driver, "make_tensordesc_arg", lambda d, meta: [f"map of {d} {meta}", 5, 64, 64, 1])
    class InC:
        def __call__(self, *given):
            seen.append(flat(given))

    seen, version = [], triton.__version__
    if tuple(version.split(".")[:2]) not in runtime.KNOWN_LAUNCHERS:
        pytest.skip(f"the launcher of Triton {version} is called as it is")
    run = launcher(InC(), signature, ["a", "b"] if signature is DESCRIBED else None)
    for known in (version, "2.1.0"):  # one whose launcher we call past, and one that we do not know
        made = compiled_by(run, known, monkeypatch)
        assert (made._run is run) == (known == "2.1.0")
        described = made.described(arguments[:3]) + arguments[3:] if signature is DESCRIBED else arguments
        made("stream", *described)
    run(7, 1, 1, "stream", 99, (4, 1, 0), None, None, None, *arguments, 64, True)
    past, unknown, wanted = seen
    assert past == wanted == unknown and "stream" in wanted


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="the launcher is Triton's")
def test_a_kernel_that_needs_scratch_memory_is_launched_by_triton(monkeypatch):
    run = launcher(print, {0: "*fp32"})
    run.global_scratch_size = 8
    assert compiled_by(run, triton.__version__, monkeypatch)._run is run


@pytest.mark.parametrize("launch", [lambda *given: given, None], ids=["with other names", "without a launcher"])
def test_a_launcher_that_is_not_as_we_know_it_is_called_as_it_is(launch, monkeypatch):
    """The second stands for a kernel that needs more than the GPU has: its call says so."""
    run = SimpleNamespace(launch=launch, global_scratch_size=0, profile_scratch_size=0)
    if launch is None:
        del run.launch, run.global_scratch_size
    made = compiled_by(run, "3.6.0", monkeypatch)
    assert made._run is run and made.described(("x", None)) == ("x", None)


# the interpreter


@triton.jit
def _scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr, PDL: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n) * factor, mask=i < n)


def scaled(x):
    y = torch.empty_like(x)
    step = Step(_scale_kernel, 2, {"x_ptr": x.dtype, "y_ptr": x.dtype}, {"n": x.numel(), "factor": 0.5}, {"BLOCK": 16},
                {"num_warps": 1})
    if x.is_cuda:
        Launch(step, x.get_device())(x.data_ptr(), x.data_ptr(), y.data_ptr())
    else:
        step.interpret({"x_ptr": x, "y_ptr": y})
    return y


@pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
def test_a_launch_runs_where_it_is():
    x = torch.arange(21, dtype=torch.float32, device=runtime.device())
    assert same_bits(scaled(x), x / 2)


@pytest.mark.gpu
def test_a_launch_serves_any_alignment_on_a_gpu():
    x = torch.arange(40, dtype=torch.bfloat16, device="cuda")
    for start in (0, 1, 8, 3):
        assert same_bits(scaled(x[start : start + 20]), x[start : start + 20] / 2)


def test_the_interpreter_refuses_what_it_gets_wrong():
    with pytest.raises(TypeError, match="wrong for bfloat16"):
        launch_of(-1).step.interpret({"x_ptr": ONE.bfloat16(), "y_ptr": ONE})


# torch.compile of a default


def test_a_default_is_compiled_at_its_first_call(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: made.append(options) or function)

    def default(x, dim=None):
        """Doc."""
        return x, dim

    call = compiled(default)
    assert made == [] and call.__doc__ == "Doc."
    assert call(1, dim=2) == (1, 2) and call(3) == (3, None)
    assert made == [{"dynamic": False}]
