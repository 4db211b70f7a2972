"""The text: which files, in which order, what is held out, and its digest for the Python that runs."""
import hashlib

import pytest
from trained import library

from kernels.training import corpus
from kernels.training.corpus import gather, windows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return library(tmp_path_factory.mktemp("stdlib") / "lib")


def test_files_are_taken_in_the_order_of_their_paths(folder):
    found = gather(folder, "3.11.7")
    names = sorted(f"m{i:03}.py" for i in range(170))
    held = [name for i, name in enumerate(names) if i % 10 == 5]
    kept = [name for name in names if name not in held]
    assert found.text == b"".join(b"\0" + (folder / name).read_bytes() for name in kept)
    assert found.sha256 == hashlib.sha256(found.text).hexdigest()
    assert (found.python, found.files, found.held_out_files) == ("3.11.7", 153, 17)
    other = b"".join(b"\0" + (folder / name).read_bytes() for name in held)
    assert found.held_out_sha256 == hashlib.sha256(other).hexdigest()
    assert found.licence == b"a licence\n"


def test_the_excerpt_is_held_out_text_that_begins_with_lines(folder):
    found = gather(folder, "3.11.7").excerpt
    assert len(found) == 65536 == corpus.PIECES * corpus.PIECE
    pieces = windows(found, 4096, 16)
    held = [(folder / f"m{i:03}.py").read_bytes() for i in range(5, 170, 10)]
    homes = [[i for i, text in enumerate(held) if piece in text] for piece in pieces]
    assert homes == [[i] for i in range(16)]
    for piece, (home,) in zip(pieces, homes, strict=True):
        place = held[home].index(piece)
        assert held[home][place - 1 : place] == b"\n" and abs(place - (len(held[home]) - 4096) // 2) <= 1024


def test_a_text_without_lines_is_cut_at_its_middle(tmp_path):
    lines = library(tmp_path / "lib", files=160)
    for i in range(5, 160, 10):
        (lines / f"m{i:03}.py").write_bytes(bytes([97 + i % 26]) * 4096 + b"#" * 9000)
    assert gather(lines, "3").excerpt == b"#" * 65536


@pytest.mark.parametrize("name", ["test/a.py", "json/tests/a.py", "idlelib/idle_test/a.py", "site-packages/x/a.py",
                                  "dist-packages/a.py", "encodings/cp037.py", "pydoc_data/topics.py",
                                  "_sysconfigdata__x86_64-linux-gnu.py", "config-3.12-x86_64/python-config.py",
                                  "__pycache__/a.py", "lib2to3/a.py", "notes.txt"])
def test_what_is_no_source_of_the_library_is_left_out(folder, name):
    before = gather(folder, "3.11.7")
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("x = 1\n")
    try:
        assert gather(folder, "3.11.7") == before
    finally:
        file.unlink()


def test_files_in_folders_are_taken_by_their_whole_path(tmp_path):
    lines = library(tmp_path / "lib")
    (lines / "m16").mkdir()
    (lines / "m16" / "z.py").write_text("deep\n")
    before, after = ((lines / f"m{i}.py").read_bytes() for i in (159, 160))
    assert before + b"\0deep\n\0" + after in gather(lines, "3").text  # 'm16/' before 'm160'


def test_bad_libraries_are_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="empty holds no Python source"):
        gather(tmp_path / "empty", "3")
    with pytest.raises(ValueError, match="small must hold 16 held-out files of 8192 bytes or more, has 2"):
        gather(library(tmp_path / "small", files=20), "3")
    for given in ((folder, None), (None, "3")):
        with pytest.raises(ValueError, match="needs its version, such as 3.11.7"):
            gather(*given)
    (library(tmp_path / "bare") / "LICENSE.txt").unlink()
    assert gather(tmp_path / "bare", "3").licence is None


def test_this_pythons_library_is_large_enough():
    found = gather()
    assert len(found.text) > 5_000_000 and found.files > 300 and len(found.excerpt) == 65536
    assert b"\0" + b"import" not in found.excerpt and found.text[:1] == b"\0"
    assert found.excerpt[:4096] not in found.text
