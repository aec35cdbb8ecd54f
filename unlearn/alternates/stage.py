"""The alternates stage from files to files: read rows, load the model, invent other answers, write them. Wiring only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lm.devices import accelerator, launch_facts, load_here, together
from lm.errors import UserError
from lm.model import fingerprint
from lm.row_files import data_hash, load_rows
from lm.run_folder import RunFolder, stage, write_atomic
from unlearn.alternates.config import AlternatesConfig
from unlearn.alternates.invent import invent
from unlearn.generation.batching import Workers

ALTERNATES = "alternates.jsonl"
_DRAFTS = "drafts"


@stage
def run_alternates(config: AlternatesConfig) -> Path:
    """Write `alternates.jsonl`, an object a row with `id` and `alternates`, into `config.out`; returns its path.

    Raises:
        UserError: whatever the user can mend, before the model is loaded wherever that is possible; and rows that have no
            alternate after all attempts, once the others are written.
    """
    rows = load_rows(config.rows, columns=config.columns)
    acc = accelerator(cpu=config.model.device == "cpu")
    model = load_here(acc, config.model)
    with together(acc):
        if acc.is_main_process:
            facts = {"rows": data_hash(rows), "weights": fingerprint(model), "devices": launch_facts(acc)}
            RunFolder.create(config.out, config, resume=config.resume, facts=facts, same=("rows", "weights"))
    run = RunFolder(config.out, main=acc.is_main_process)
    path, drafts = run.path / ALTERNATES, run.path / _DRAFTS
    if path.exists() and not drafts.exists():
        acc.print(f"already finished: {path}")
        return path
    invented = invent(model, rows, config, workers=Workers(acc.process_index, acc.num_processes), drafts=drafts)
    if acc.is_main_process:
        lines = [{"id": row.id, "alternates": texts} for row, texts in zip(rows, invented, strict=True) if texts]
        write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), private=True)
        run.finish(alternates=sum(map(len, invented)), rows_without=len(rows) - len(lines))
        if len(lines) == len(rows):  # else the run is not what was asked for, and says so again when it goes on
            shutil.rmtree(drafts, ignore_errors=True)
    acc.wait_for_everyone()
    without = [row.id for row, texts in zip(rows, invented, strict=True) if not texts]
    if without:
        raise UserError(
            f"{len(without)} of {len(rows)} rows have no alternate, {without[0]} first (the others' are in {path}): raise "
            "attempts or temperature, or ask another model"
        )
    return path


def describe(config: AlternatesConfig, result: Path) -> str:
    """What a finished stage says."""
    return f"wrote {result}"
