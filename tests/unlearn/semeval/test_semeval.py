"""The competition's entry point: its folders in, a checkpoint out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lm.errors import UserError
from tests.unlearn.helpers import SMALL, run_script


def test_the_contract_reads_the_published_folders_and_leaves_a_checkpoint(tiny: Path, tmp_path: Path) -> None:
    import pandas

    for side in ("forget", "retain"):
        (tmp_path / side).mkdir()
        rows = [json.loads(line) for line in (tiny / f"{side}.jsonl").read_text().splitlines()]
        frame = pandas.DataFrame(rows)
        frame["split"] = side
        frame.to_parquet(tmp_path / side / f"{side}.parquet")
        if side == "forget":
            frame.to_json(tmp_path / side / f"{side}.jsonl", orient="records", lines=True)
    from unlearn.semeval.stage import unlearn

    out = unlearn(
        str(tiny / "model"), str(tmp_path / "out"), str(tmp_path / "forget"), str(tmp_path / "retain"), trainer=SMALL
    )
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 3
    with pytest.raises(UserError, match="already holds a model"):
        unlearn(str(tiny / "model"), str(out), str(tmp_path / "forget"), str(tmp_path / "retain"))


@pytest.mark.parametrize("launch", [None, "cpu2_ddp"])
def test_the_contract_is_a_script(tiny: Path, tmp_path: Path, launch: str | None) -> None:
    for side in ("forget", "retain"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "rows.jsonl").write_text((tiny / f"{side}.jsonl").read_text())
    done = run_script(
        "semeval",
        f"--input_model_path={tiny / 'model'}",
        f"--output_path={tmp_path / 'out'}",
        f"--forget_dir={tmp_path / 'forget'}",
        f"--retain_dir={tmp_path / 'retain'}",
        launch=launch,
    )
    assert done.returncode == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None
