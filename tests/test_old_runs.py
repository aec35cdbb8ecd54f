"""A run folder written before files, classes and keys had their names of today goes on as if nothing had happened.

`tests/data/before_the_rooms` was recorded at commit 86cd1fb: an unlearning run stopped after two of four steps and a trace
stopped after its first corruption, with the log and the plan of the same two left alone to their ends.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from lm import row_files
from lm.config import parse_config
from lm.loading import load
from lm.model import fingerprint
from lm.run_folder import RunFolder
from tracing.stages.trace.config import TraceConfig
from tracing.stages.trace.stage import run_trace
from unlearn.config import UnlearnConfig
from unlearn.objectives import NPO, Divergence, Fixed
from unlearn.stage import run_unlearn

RECORDED = Path(__file__).parent / "data" / "before_the_rooms"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in; the configs name folders beside it."""
    shutil.copytree(RECORDED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_unlearning_run_goes_on(folder: Path) -> None:
    recorded = RunFolder(folder / "unlearn").manifest
    data = {side: row_files.data_hash(row_files.load_rows(f"builtin:{side}")) for side in ("forget", "retain")}
    built = {"weights": fingerprint(load("builtin", device="cpu")), "data": data}
    assert {name: recorded[name] for name in built} == built, (
        "record the runs anew if the built-in model was built anew"
    )
    config = parse_config(UnlearnConfig, ["--config", "unlearn/config.yaml", "--resume", "true"])
    assert (config.objective, config.retain_loss, config.retain_weight) == (NPO(), Divergence(), Fixed(factor=2.0))
    assert config.scope.lora is not None
    assert not config.scope.lora.quantize
    result = run_unlearn(config)
    assert (result / "model.safetensors").is_file()
    lines = RunFolder(folder / "unlearn").metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    whole = [json.loads(line) for line in (folder / "unlearn_to_the_end.jsonl").read_text().splitlines()]
    for one, other in zip(lines, whole, strict=True):
        assert {name: one[name] for name in other} == pytest.approx(other, rel=1e-4)  # a line says more since then


def test_a_trace_goes_on_with_its_finished_facts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(TraceConfig, ["--config", "trace/config.yaml", "--resume", "true"])
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "trace" / "facts").iterdir()}
    assert len(before) == 2
    result = run_trace(config)
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "trace" / "facts").iterdir()}
    assert before.items() <= after.items(), "finished facts were traced again"
    assert list(result.plan.layers) == json.loads((folder / "trace_plan.json").read_text())["layers"]


def test_what_is_written_now_names_classes_alone(folder: Path) -> None:
    old = parse_config(UnlearnConfig, ["--config", "unlearn/config.yaml"])
    RunFolder.create(folder / "new", old)
    assert yaml.safe_load((folder / "new" / "config.yaml").read_text())["objective"]["class_path"] == "NPO"


def test_an_old_name_is_said_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parse_config(UnlearnConfig, ["--config", "unlearn/config.yaml"])
    said = capsys.readouterr().err
    assert said.count("notice: scope.lora.quantise is called scope.lora.quantize now") == 1
