"""`redraw`: a notebook's cells that print recorded data alone are executed again, and no other output changes."""
import nbformat

from kernels.lab.notebook import run


def test_only_tagged_cells_get_new_outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "faults", lambda nb: [])
    made = [nbformat.v4.new_code_cell(source, outputs=[nbformat.v4.new_output("stream", text="old")],
                                      execution_count=i + 1, metadata=metadata)
            for i, (source, metadata) in enumerate((("print('first')", {}), ("print(2)", {"tags": ["recorded"]})))]
    path = tmp_path / "09_toy.ipynb"
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=made)))
    run.redraw(path, timeout=60)
    cells = run.read(path).cells
    assert [cell.outputs[0]["text"] for cell in cells] == ["old", "2\n"]
