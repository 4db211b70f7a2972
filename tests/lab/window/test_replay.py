"""The cost of a verify pass at work: its shapes, what one pass does, floors by pencil, cells without room."""
import pytest
import torch

from kernels.lab import bench
from kernels.lab.window import measure, replay
from kernels.lab.window.measure import VERIFY_COST, Ceilings
from kernels.lab.window.replay import Cell
from kernels.model import Llama
from kernels.model.config import preset

CEILINGS = Ceilings(copy_gbytes_per_s=20.0, matmul_tflops=0.1)
TINY = Llama("tiny", dtype=torch.float32, device="cpu")
FEW = [Cell(4, 6, 2), Cell(8, 3, 1)]


def rows(ops=("default",), shapes=FEW, **options):
    return replay.verify_cost(TINY, shapes, ops, **{"runs": 2, "warmups": 1, "ceilings": CEILINGS, **options})


def test_passes_are_of_512_tokens_behind_both_prefixes():
    shapes = replay.cells(preset("llama-3.1-8b"), (512, 16, 64))
    assert shapes == [Cell(16, 1024, 32), Cell(16, 4096, 32), Cell(64, 1024, 8), Cell(64, 4096, 8),
                      Cell(512, 1024, 1), Cell(512, 4096, 1)]
    assert {cell.tokens for cell in shapes} == {512}


@pytest.mark.parametrize(("windows", "prefixes", "said"), [
    ((48,), (8,), "must divide the 512 tokens of a pass, got 48"), ((0,), (8,), "got 0"),
    ((1024,), (8,), "got 1024"), ((64,), (1000,), "a window of 64 tokens behind 1000 is longer than tiny's context"),
])
def test_shapes_that_cannot_be_are_refused(windows, prefixes, said):
    with pytest.raises(ValueError, match=said):
        replay.cells(TINY.config, windows, prefixes)


def test_keys_and_values_by_pencil():
    """Llama-3.1-8B: 32 layers of 8 heads of 128, keys and values, two bytes: 128 KiB a token."""
    cell = Cell(64, 4096, 8)
    assert cell.kv_bytes(preset("llama-3.1-8b"), torch.bfloat16) == 8 * (4096 + 64) * 128 * 1024
    free_of_products = Ceilings(copy_gbytes_per_s=4000.0, matmul_tflops=1e9)
    config = preset("llama-3.1-8b")
    products = measure.floor_ms(config, 512, torch.bfloat16, free_of_products, logits=512)
    assert cell.floor_ms(config, torch.bfloat16, free_of_products) - products == pytest.approx(1.0905, rel=1e-3)


def test_a_pass_chooses_behind_every_token_what_the_model_does():
    cell, cache = FEW[0], TINY.cache(2, 10)
    cache.kv.normal_(generator=torch.Generator("cpu").manual_seed(3))
    window = torch.tensor([(7919 * i + 13) % 256 for i in range(8)]).view(2, 4)
    wanted = TINY(window, cache, prefix=6, logits="all").argmax(-1).flatten().tolist()
    before = cache.kv[:, :, :6].clone()
    assert replay.verify_pass(TINY, cache, cell)() == wanted
    assert torch.equal(cache.kv[:, :, :6], before)


def test_each_cell_and_ops_has_its_row():
    found = rows(("default", "tiled"))
    assert list(found[["curve", "ops", "tokens", "prefix", "group"]].itertuples(index=False, name=None)) == [
        ("verify", ops, cell.window, cell.prefix, cell.group) for cell in FEW for ops in ("default", "tiled")]
    assert ((found.ms_p05 > 0) & (found.ms_p05 <= found.ms_p50) & (found.ms_p50 <= found.ms_p95)).all()
    assert (found.ms_per_token_p50 * 8 - found.ms_p50).abs().max() < 1e-9, "divided by the tokens of the pass"
    assert set(found.source) == {replay.source()} and len(rows(("default", "tiled"), done=found)) == 0
    with pytest.raises(ValueError, match="ops must be default or tiled on cpu, got 'fused'"):
        rows(("fused",))


@pytest.mark.parametrize("where", ["asked first", "in the middle"])
def test_a_cell_without_room_is_named_and_the_others_are_measured(where, monkeypatch, capsys):
    if where == "asked first":
        monkeypatch.setattr(replay, "free_memory", lambda device: 20_000)  # the smaller needs 13 kB, the other 29
        monkeypatch.setattr(Cell, "pass_bytes", lambda cell, *_: 13_000 if cell.group == 1 else 29_000)
    else:
        make = replay.verify_pass
        monkeypatch.setattr(replay, "verify_pass", lambda model, cache, cell: make(model, cache, cell)
                            if cell.group == 1 else full())
    found = rows()
    assert found.ms_p50.isna().tolist() == [True, False] and found.floor_ms.notna().all()
    assert "tiny: 2 windows of 4 tokens behind 6 do not fit" in capsys.readouterr().err


def full():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_the_command_records_the_curve_and_names_what_it_has_not(tmp_path, monkeypatch, capsys):
    for name, value in (("copy_gbytes_per_s", 20.0), ("matmul_tflops", 0.1)):
        monkeypatch.setattr(bench, name, lambda device=None, value=value: value)
    monkeypatch.setattr(replay, "WARMUPS", 0)
    asked = ["--model", "tiny", "--curves", "verify", "--prefixes", "4", "--out", str(tmp_path), "--machine", "here"]
    assert measure.main([*asked, "--windows", "512", "1024"]) == 0
    assert "passes of 512 tokens, and no window of 1024" in capsys.readouterr().err
    table = VERIFY_COST.read(tmp_path / "here")
    assert table[["curve", "tokens", "prefix", "group"]].values.tolist() == [["verify", 512, 4, 1]]
    assert measure.main([*asked, "--windows", "48"]) == 2
    assert "must divide the 512 tokens" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("ops", ["default", "invariant", "fused"])
def test_a_graph_chooses_what_eager_code_does(ops):
    model, cell = Llama("tiny", ops=ops), Cell(16, 32, 4)
    cache = model.cache(4, 48)
    step = replay.verify_pass(model, cache, cell)
    batch = cache.batch([16] * 4, [32] * 4)
    tokens = torch.tensor([(7919 * i + 13) % 256 for i in range(64)], device=model.device)
    assert step() == model.forward(tokens, batch, cache, logits="all").argmax(-1).tolist()
