"""A run folder for a while: where a run from memory keeps what does not fit there, gone when it ends."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lm.run_folder import RunFolder, write_json


@contextmanager
def scratch_run(acc: Accelerator) -> Iterator[RunFolder]:
    """A temporary run folder that all processes share. Every process must enter and leave it."""
    made = tempfile.mkdtemp(prefix="palimpsest-") if acc.is_main_process else ""
    (folder,) = broadcast_object_list([made])
    run = RunFolder(folder, main=acc.is_main_process)
    try:
        if run.main:
            write_json(Path(folder) / "manifest.json", {})
        acc.wait_for_everyone()
        yield run
        acc.wait_for_everyone()
    finally:
        if run.main:
            shutil.rmtree(folder, ignore_errors=True)
