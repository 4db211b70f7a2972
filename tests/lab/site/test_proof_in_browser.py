"""The page that redoes a GPU's digest in the browser: it agrees with the record, and stops to when something moves."""
import hashlib
import shutil

import pytest

from kernels.lab import records
from kernels.lab.proofs.digests import DIGESTS
from kernels.lab.site import proof

pytestmark = pytest.mark.browser

VERDICT = "document.getElementById('proof-verdict').dataset.state"


@pytest.fixture
def proved(site, page):
    """The page, computed; `proved.again(NAME=VALUE, ...)` sets controls and gives (state, digest, words)."""
    page.goto((site / "proof.html").as_uri())
    page.wait_for_function(f"{VERDICT} !== 'waiting'")

    def again(flip=False, swap=False, **values):
        page.evaluate("document.getElementById('proof-verdict').dataset.state = 'waiting'")
        if "record" in values:
            page.select_option("#proof-record", str(values.pop("record")))
        for name, value in values.items():
            page.fill(f"#proof-{name}", str(value))
        for name, wanted in (("flip", flip), ("swap", swap)):
            page.set_checked(f"#proof-{name}", wanted)
        page.evaluate("document.getElementById('proof-verdict').dataset.state = 'waiting'")
        page.click("#proof-again")
        page.wait_for_function(f"{VERDICT} !== 'waiting'")
        page.wait_for_timeout(50)
        return page.evaluate(VERDICT), page.inner_text("#proof-here"), page.inner_text("#proof-words")

    page.again = again
    return page


def milliseconds(page) -> int:
    return int(page.inner_text("#proof-ms").removesuffix(" ms"))


def test_it_opens_with_the_gpus_digest(proved):
    first = proof.recorded()[0]
    assert (first["shape"], first["dtype"]) == proof.FIRST
    assert proved.evaluate(VERDICT) == "same"
    assert proved.inner_text("#proof-here") == proved.inner_text("#proof-recorded") == first["digest"]
    assert first["device"] in proved.inner_text("#proof-machine")
    assert min(proved.again() and milliseconds(proved) for _ in range(3)) < 2000


def test_every_record_that_it_offers_is_redone(proved):
    for i, record in enumerate(proof.recorded()):
        state, digest, _ = proved.again(record=i)
        assert (state, digest) == ("same", record["digest"]), record["label"]


def test_one_changed_bit_is_seen(proved):
    digests = set()
    for row, column, bit in ((0, 0, 0), (255, 8191, 31), (17, 1024, 22)):
        state, digest, words = proved.again(flip=True, row=row, column=column, bit=bit)
        assert state == "other" and f"in row {row}, column " in words
        digests.add(digest)
    assert len(digests) == 3
    assert proved.again()[0] == "same"


def test_a_swapped_addition_is_seen_unless_it_is_the_first(proved):
    state, digest, words = proved.again(swap=True)
    assert state == "other" and digest != proof.recorded()[0]["digest"] and "two additions changed places" in words
    state, digest, words = proved.again(swap=True, first=0, second=1)
    assert (state, digest) == ("same", proof.recorded()[0]["digest"]) and "a + b and b + a are one sum" in words


@pytest.mark.parametrize("control, value, said", [
    ("row", "256", "row must be a whole number from 0 to 255, got '256'"),
    ("column", "-1", "column must be a whole number from 0 to 8191, got '-1'"),
    ("bit", "two", "bit must be a whole number from 0 to 31, got 'two'")])
def test_what_cannot_be_is_said(control, value, said, proved):
    state, _, words = proved.again(flip=True, **{control: value})
    assert state == "wrong" and said in words


def test_without_the_browsers_own_sha_256_the_verdict_is_the_same(site, page):
    page.add_init_script("Object.defineProperty(crypto, 'subtle', {value: undefined})")
    page.goto((site / "proof.html").as_uri())
    page.wait_for_function(f"{VERDICT} !== 'waiting'")
    assert page.evaluate("crypto.subtle === undefined") and page.evaluate(VERDICT) == "same"


def test_a_digest_that_is_not_the_gpus_is_refused(site, page, tmp_path):
    """The verdict follows the record: another digest in data/ gives a page that says other bits."""
    shutil.copytree(records.DATA / "h200", tmp_path / "data" / "h200")
    wrong = hashlib.sha256(b"another").hexdigest()
    table = DIGESTS.read(tmp_path / "data" / "h200")
    DIGESTS.merge(tmp_path / "data" / "h200", table[table.op == "rms_norm"].assign(digest=wrong))
    text = proof.page(tmp_path / "data").partition("````{raw} html\n")[2].partition("\n````\n")[0]
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><meta charset='utf-8'>{text}", encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_function(f"{VERDICT} !== 'waiting'")
    assert page.evaluate(VERDICT) == "other" and page.inner_text("#proof-recorded") == wrong


def test_no_record_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="python -m kernels digests rms_norm"):
        proof.recorded(tmp_path)
