"""Attention's figure: its title, ranges and verdicts are those of the rows, also where ours is behind."""
import json

import numpy as np
import pytest

from figures import attention_speed
from kernels.lab import records, style

HEADS = "H=32,KV=8,D=128"
POINTS = {"attention_prefill": ([HEADS], (512, 1024)),
          "attention_decode": ([f"{HEADS},context=1024", f"{HEADS},context=8192", "H=8,KV=1,D=128,context=8192"],
                               (1, 8)),
          "attention_chunk": ([f"{HEADS},context=4096", f"{HEADS},context=8192"], (1, 2, 512))}
TIMES = {"triton": 10.0, "cuda": 20.0, "frozen": 80.0, "flash_attention_3": 5.0}


def point(op, name, shape, tokens, **other):
    return {"op": op, "implementation": name, "dtype": "bfloat16", "shape": shape, "tokens": tokens, "clock": "cold",
            "us_p50": TIMES[name], "tflops": 1000 / TIMES[name], "repeats": 21,
            "same_bits": name != "cuda" or tokens > 8} | other


def write(folder, points):
    records.TOKEN_SWEEP.merge(folder / "h200", points)
    (folder / "h200" / "machine.json").write_text(json.dumps({"device": "NVIDIA H200", "torch": "2.11.0"}))


@pytest.fixture
def data(tmp_path):
    write(tmp_path, [point(op, name, shape, count) for op, (shapes, tokens) in POINTS.items() for name in TIMES
                     for shape in shapes for count in tokens])
    return tmp_path


@pytest.fixture(autouse=True)
def theme():
    style.theme()


def lines(axes, name):
    color = style.CONTENDERS[name][0]
    return [line for line in axes.lines if line.get_color() == color and line.get_linestyle() != "None"]


def one_line(text) -> str:
    return " ".join(text.split())


def test_the_title_and_the_panels_say_what_the_rows_say(data):
    write(data, [point("attention_decode", "cuda", f"{HEADS},context=1024", 1, us_p50=5.5)])
    figure = attention_speed.draw(data)
    mean = (0.55 * 2**5) ** (1 / 6)
    assert one_line(figure.get_suptitle()) == (
        f"Attention in one order, times SDPA's speed: 2.00 in prefill, {mean:.2f} in decode, 2.00 for queries on a "
        "context; times FlashAttention-3's: 0.50, 0.50, 0.50 (geometric means)")
    assert [one_line(axes.get_title(loc="left")) for axes in figure.axes] == [
        "Prefill: 2.00 times SDPA's speed, 0.50 times FlashAttention-3's",
        "Decode: 0.55 to 2.00 times SDPA's speed, 0.50 times FlashAttention-3's",
        "Queries on a context: 2.00 times SDPA's speed, 0.50 times FlashAttention-3's"]
    caption = one_line(figure.get_supxlabel())
    assert "slower than SDPA at: prefill 0 of 2, decode 1 of 6, queries on a context 0 of 6 points" in caption
    assert "than FlashAttention-3 at: prefill 2 of 2, decode 6 of 6, queries on a context 6 of 6 points" in caption
    assert "frozen in decode, not drawn: 8.0 to 8.0 times our time" in caption


def test_every_line_is_there_and_has_its_numbers(data):
    prefill, decode, chunk = attention_speed.draw(data).axes
    for name, us in TIMES.items():
        (line,) = lines(prefill, name)
        np.testing.assert_allclose(line.get_ydata(), 1000 / us)
        assert [list(line.get_ydata()) for line in lines(chunk, name)] == [[us] * 3] * 2, "a line for each context"
    for name in attention_speed.BESIDE:
        assert len(lines(decode, name)) == 3
        assert len({line.get_marker() for line in lines(decode, name)}) == 3
        for line in lines(decode, name):
            np.testing.assert_allclose(line.get_ydata(), TIMES[name] / TIMES["triton"])


def test_the_cliff_is_told(data):
    slow = [point("attention_chunk", "cuda", f"{HEADS},context={context}", 2, us_p50=us)
            for context, us in ((4096, 50.0), (8192, 60.0))]
    write(data, slow)
    told = "two queries on a context take, times one query's time: cuda 2.5 to 3.0, triton 1.0"
    assert told in one_line(attention_speed.draw(data).get_supxlabel()) and told in attention_speed.words(data)


def test_each_line_has_its_verdict(data):
    write(data, [point("attention_prefill", "flash_attention_3", HEADS, 512, same_bits=None)])
    (legend,) = attention_speed.draw(data).legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[:4] == ["PyTorch's default: bits moved at 10 of 14 points",
                          "Schedule (Triton): same bits at all 14 points",
                          "One frozen schedule: same bits at all 14 points",
                          "FlashAttention-3: same bits at all 13 points"]
    assert {"decode, context 1,024", "decode, context 8,192, 8/1 heads", "queries on a context of 4,096"} <= {*labels}
    assert "prefill none; decode cuda at 6 of 6; queries on a context cuda at 4 of 6" in attention_speed.words(data)


@pytest.mark.parametrize("kept", [["cuda"], ["triton", "frozen"], []])
def test_without_a_comparison_it_says_how_to_record_one(kept, tmp_path):
    write(tmp_path, [point("attention_decode", name, f"{HEADS},context=1024", 1) for name in kept])
    with pytest.raises(ValueError, match="python -m kernels sweep attention_prefill"):
        attention_speed.draw(tmp_path, "h200")


def test_contenders_of_one_chart_look_apart():
    names = ["cuda", "python", "triton", "frozen", "flash_attention_3", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient"]
    for part, looks in enumerate(zip(*(style.CONTENDERS[name] for name in names), strict=True)):
        apart = looks if part != 2 else [look for look in looks if look != "-"]  # the three lines of every chart
        assert len(set(apart)) == len(apart)


def test_what_the_record_says():
    rows, _ = attention_speed.recorded(records.DATA)
    ratio = attention_speed.relative(rows)
    assert set(ratio.index.unique("op")) == set(attention_speed.OPS)
    decode, chunk = ratio.loc["attention_decode"], ratio.loc["attention_chunk"]
    assert decode.cuda.idxmin() == (f"{HEADS},context=2048", 1) and 0.7 < decode.cuda.min() < 0.85
    one = [decode.cuda[f"{HEADS},context={context}", 1] for context in (1024, 2048, 4096)]
    assert max(one) < 0.9, "one request of one to four leaves"
    long, prompts = decode.flash_attention_3[f"{HEADS},context=65536"], ratio.loc["attention_prefill"].flash_attention_3
    assert (long < 1).all() and (prompts[HEADS][prompts[HEADS].index >= 2048] < 1).all()
    beside, tokens = chunk.flash_attention_3, chunk.index.get_level_values("tokens")
    assert (beside[tokens.isin([128, 256])] < 0.95).all() and (beside[tokens <= 16] > 0.95).all()
    assert (beside[tokens >= 32] < 1).sum() >= 9
    assert rows[rows.implementation.isin(["triton", "frozen"])].same_bits.all()
    assert not rows[rows.implementation.isin([*attention_speed.BESIDE])].same_bits.all()


def test_no_two_contexts_of_decode_have_one_mark(data):
    more = [f"{HEADS},context={2 ** n}" for n in range(9, 15)] + ["H=8,KV=1,D=128,context=512"]
    write(data, [point("attention_decode", name, shape, count) for name in TIMES for shape in more for count in (1, 8)])
    rows, _ = attention_speed.recorded(data)
    marks = [mark for _, mark in attention_speed._contexts(rows)]
    assert len(marks) == len(set(marks)) == 8
    ours, _ = attention_speed.recorded(records.DATA)
    marks = [mark for _, mark in attention_speed._contexts(ours)]
    assert len(marks) == len(set(marks)) == 9
