"""One forget row from its file to its loss: whose code it meets on the way is little enough to be read in an hour.

At most 12 files are allowed. Counted are the files of this repository of which a function is entered between
`load_rows` and the loss of a micro-batch; making the model, the batches and the stepper ready is no part of the
row's way, and neither are the retain rows and their weight.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch

from lm.devices import accelerator
from lm.loading import load
from lm.prompts import PromptSpec
from lm.row_files import load_rows
from unlearn.forward.passes import Passes
from unlearn.objectives import Joint, Loss, RetainMemory
from unlearn.scope.scope import Scope
from unlearn.training.batches import PairedBatches
from unlearn.training.side import Side, encode_rows
from unlearn.training.step import Stepper

ROOT = Path(__file__).resolve().parents[1]
MOST = 12


@contextmanager
def files_entered() -> Iterator[list[str]]:
    """The files of this repository whose functions are entered while it is open, in the order of the first time."""
    files: list[str] = []

    def called(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests"):
            name = str(path.relative_to(ROOT))
            if frame.f_code.co_name != "<module>" and name not in files and not name.startswith("."):
                files.append(name)

    before = sys.gettrace()
    sys.settrace(called)
    try:
        yield files
    finally:
        sys.settrace(before)


@pytest.mark.skipif(sys.gettrace() is not None, reason="something else traces, a debugger or coverage")
def test_a_forget_row_meets_few_files_from_its_file_to_its_loss(tiny: Path) -> None:
    model = load(str(tiny / "model"), device="cpu")
    acc, loss = accelerator(cpu=True), Loss.of(Joint())
    Scope(layers=(1,)).resolve(model.anatomy).apply(model.model, model.anatomy)
    passes = Passes(acc, model.model, model)
    with files_entered() as files:
        rows = load_rows(tiny / "forget.jsonl")
        side = Side(encode_rows(model, rows, PromptSpec()))
    batches = PairedBatches(forget=len(rows), retain=0, batch=2)
    stepper = Stepper(passes, loss, side, Side([]), micro_batch=2, weighting="global_tokens")
    with files_entered() as later:
        result = stepper.gradient(batches.step(0), RetainMemory())
    files += [name for name in later if name not in files]
    assert result.loss < 0, "it was gone the whole way: the joint objective raises the forget rows' cross-entropy"
    assert any(p.grad is not None and bool(torch.any(p.grad != 0)) for p in model.model.parameters())
    assert {"lm/row_files.py", "lm/prompts.py", "unlearn/forward/passes.py", "unlearn/training/step.py"} <= {*files}
    assert len(files) <= MOST, f"{len(files)} files: {', '.join(files)}"
