"""Every notebook runs from its first cell to its last, with fewer training steps, and holds no outputs in the repository."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install '.[tests]'")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install '.[tests]'")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_not_kept(path: Path) -> None:
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def executed(name: str, parameters: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The outputs of a notebook, run in `folder`, with its cell of parameters replaced."""
    notebook = read(ROOT / "notebooks" / name)
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(tagged) == 1
    tagged[0].source = parameters
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_train_and_read_an_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = 'STEPS = 30\nOUT = Path("runs/notebook")'
    outputs = executed("02_train_and_read_an_sae.ipynb", parameters, tmp_path, monkeypatch)
    data = [output.data for output in outputs if output.output_type == "display_data"]
    assert sum("image/png" in one for one in data) == 2
    pages = [one["text/html"] for one in data if "text/html" in one]
    assert len(pages) == 6
    assert all("<span" in page and "writes" in page for page in pages)
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "of the variance explained" in said
    if importlib.util.find_spec("sae_lens") is None:
        assert "SAELens is not installed" in said
    else:
        apart = re.search(r"SAELens gives the same features to (\S+)", said)
        assert apart is not None
        assert float(apart[1]) <= 1e-5
    assert (tmp_path / "runs" / "notebook" / "mutual" / "sae_weights.safetensors").is_file()


def test_where_is_it_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = executed("01_where_is_it_stored.ipynb", "MAX_FACTS = 4", tmp_path, monkeypatch)
    data = [output.data for output in outputs if output.output_type == "execute_result"]
    assert sum("image/png" in one for one in data) == 4  # means, one fact, severed paths, other names
    assert any("Effects(4 facts" in one["text/plain"] for one in data)
    assert "indirect" in data[-1]["text/html"]
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert said.count("The evidence") == 5  # a band, three other rules, and the band beside other names
    assert said.count("rank correlation") >= 3
    assert "controls: {'random'" in said


def test_from_the_model_to_a_plan_in_fewer_than_twenty_lines() -> None:
    code = [
        cell.source
        for cell in read(ROOT / "notebooks" / "01_where_is_it_stored.ipynb").cells
        if cell.cell_type == "code"
    ]
    lines = [line for line in "\n".join(code).splitlines() if line.strip()]
    first = next(place for place, line in enumerate(lines) if 'lm.load("builtin")' in line)
    planned = next(place for place, line in enumerate(lines) if "choose_layers(effects" in line)
    assert planned - first + 1 < 20
    assert planned + 1 < 20  # with the imports
