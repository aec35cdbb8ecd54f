"""One tensor a row, computed once by all processes together, kept in the run folder and mapped into memory.

What stays the same during a run need not be computed at every step. A store is named by the content of what it was made
from, so another one is never taken for it; the system's page cache keeps in memory what fits there.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lm.devices import together
from lm.prompts import Encoded
from lm.run_folder import RunFolder, damage, move, seal, writable
from unlearn.training.batches import micro_batches

STORES = "stores"
_PART = 1 << 28
"""Bytes that are written at once."""


class RowStore:
    """The tensors of a finished store, by the number of the row; a row is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._places: dict[int, tuple[Path, int, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                first = 0
                for row, length in zip(*(file.get_tensor(name).tolist() for name in ("rows", "lengths")), strict=True):
                    self._places[row] = (path, first, first + length)
                    first += length
        self._open = {path: safe_open(path, framework="pt") for path, _, _ in self._places.values()}

    def __getitem__(self, row: int) -> Tensor:
        path, first, last = self._places[row]
        values: Tensor = self._open[path].get_slice("values")[first:last]  # type: ignore[no-untyped-call]
        return values


def stored(
    acc: Accelerator,
    run: RunFolder,
    name: str,
    texts: Sequence[Encoded],
    used: Sequence[int],
    compute: Callable[[list[int]], list[Tensor]],
    *,
    made_from: str,
    size: int,
) -> RowStore:
    """A tensor for each of `texts` whose place is in `used`; from the run folder if it is there. Every process must call it.

    Args:
        compute: the places of some texts to a tensor each, (any length, …); it is called equally often on every process.
        made_from: what else the tensors depend on.
        size: texts at once.
    """
    content = hashlib.sha256(f"{name} {made_from} {acc.num_processes}".encode())
    for index in used:
        content.update(f"{index} {texts[index].answer_start} {texts[index].ids}".encode())
    folder = run.path / STORES / f"{name}-{content.hexdigest()[:16]}"
    with together(acc):
        if run.main and folder.exists() and damage(folder) is not None:
            shutil.rmtree(folder)
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}.tmp")
        with writable(temporary):
            if acc.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            acc.wait_for_everyone()
            by_length = sorted(used, key=lambda index: (-len(texts[index].ids), index))
            _write(temporary, acc.process_index, by_length, compute, size, acc.num_processes)
            acc.wait_for_everyone()
            if acc.is_main_process:
                seal(temporary)
                move(temporary, folder)
    acc.wait_for_everyone()
    return RowStore(folder)


def forget_stores(run: RunFolder) -> None:
    """Delete every store of a run: a finished one needs none."""
    if run.main:
        shutil.rmtree(run.path / STORES, ignore_errors=True)


def _write(
    folder: Path,
    process: int,
    order: Sequence[int],
    compute: Callable[[list[int]], list[Tensor]],
    size: int,
    processes: int,
) -> None:
    """This process's share, in files of a bounded size."""
    rows: list[int] = []
    values: list[Tensor] = []
    held = part = 0
    for micro in micro_batches(order, size, process, processes):
        computed = [value.detach().cpu() for value in compute(list(micro))][: len(micro)]
        rows, values = [*rows, *micro], [*values, *computed]
        held += sum(value.nbytes for value in computed)
        if held >= _PART:
            _save(folder / f"{process}-{part}.safetensors", rows, values)
            rows, values, held, part = [], [], 0, part + 1
    if rows:
        _save(folder / f"{process}-{part}.safetensors", rows, values)


def _save(path: Path, rows: list[int], values: list[Tensor]) -> None:
    lengths = torch.tensor([len(value) for value in values])
    save_file({"rows": torch.tensor(rows), "lengths": lengths, "values": torch.cat(values)}, path)
