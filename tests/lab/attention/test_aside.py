"""What is said of pages and of mixed sequences is what the rows say; nothing is said where there are none."""
import json

import pandas as pd
import pytest

from figures import attention_speed
from kernels.lab import records, style
from kernels.lab.attention import aside

HEADS = "H=32,KV=8,D=128"
CHUNK, DECODE = (f"{HEADS},context=4096", f"{HEADS},context=8192")
SPOKEN = {"cuda": "SDPA", "flash_attention_3": "FlashAttention-3"}


def row(op, name, shape, tokens, us, **other):
    return {"op": op, "implementation": name, "dtype": "bfloat16", "shape": shape, "tokens": tokens, "clock": "cold",
            "us_p50": us, "tflops": 1.0, "repeats": 21, "same_bits": True} | other


PAGED = [row("attention_decode", "triton", f"{DECODE},page=64", 1, 10.3),
         row("attention_decode", "triton", f"{DECODE},page=64", 8, 39.6),
         row("attention_decode", "triton", f"{DECODE},page=64", 32, 99.0),  # whose keys side by side are not recorded
         row("attention_decode", "cuda", f"{DECODE},page=64", 1, 50.0),
         row("attention_decode", "triton", f"{DECODE},page=16", 8, 44.0),
         row("attention_chunk", "triton", f"{CHUNK},mixed,page=64", 1024, 303.0)]
MIXED = [row("attention_chunk", "triton", f"{CHUNK},mixed", 1024, 300.0),
         row("attention_chunk", "cuda", f"{CHUNK},mixed", 1024, 600.0),
         row("attention_chunk", "flash_attention_3", f"{CHUNK},mixed", 1024, 270.0)]
PLAIN = [row(op, name, shape, tokens, us) for op, shape in (("attention_decode", DECODE), ("attention_chunk", CHUNK))
         for name, scale in (("triton", 1), ("cuda", 2)) for tokens, us in ((1, 10.0 * scale), (8, 40.0 * scale))]


def test_pages_are_compared_with_the_same_point_side_by_side():
    found = aside.paged(pd.DataFrame(PAGED + MIXED + PLAIN))
    assert found.groupby(level=0).agg(list).to_dict() == {64: pytest.approx([1.03, 0.99, 1.01]),
                                                          16: pytest.approx([1.1])}


def test_mixed_sequences_are_compared_with_each_contender():
    rows = pd.DataFrame(PAGED + MIXED + PLAIN)
    assert aside.mixed(rows, "triton", "cuda").to_dict() == {1024: 2.0}
    assert aside.mixed(rows, "triton", "flash_attention_3").to_dict() == {1024: pytest.approx(0.9)}


def test_both_are_told_in_words_and_nothing_without_rows():
    assert aside.told(pd.DataFrame(PAGED + MIXED + PLAIN), "triton", SPOKEN) == (
        " · keys in pages of 16 take 1.10 times as long as keys side by side (1 point)"
        " · keys in pages of 64 take 0.99 to 1.03 times as long as keys side by side (3 points)"
        " · decodes, verifications, a chunk and a prompt's begin in one call: 2.00 times SDPA's speed (1 point), "
        "0.90 times FlashAttention-3's speed (1 point)")
    assert aside.told(pd.DataFrame(PLAIN), "triton", SPOKEN) == aside.told(pd.DataFrame(PLAIN).head(0), "triton",
                                                                           SPOKEN) == ""


def test_the_figure_tells_them_and_draws_what_it_drew_without_them(tmp_path):
    style.theme()
    drawn = {}
    for name, rows in (("without", PLAIN), ("with", PLAIN + PAGED + MIXED)):
        records.TOKEN_SWEEP.merge(tmp_path / name / "h200", rows)
        (tmp_path / name / "h200" / "machine.json").write_text(json.dumps({"device": "NVIDIA H200", "torch": "2.11.0"}))
        figure = attention_speed.draw(tmp_path / name)
        lines = [[line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes]
        drawn[name] = lines, " ".join(" ".join(t.get_text() for t in figure.texts).split())
        said = attention_speed.words(tmp_path / name)
        assert ("keys in pages of 64 take 0.99 to 1.03 times" in said) == (name == "with")
    assert drawn["with"][0] == drawn["without"][0]
    assert "in one call: 2.00 times SDPA's speed" in drawn["with"][1] and "in one call" not in drawn["without"][1]
