"""Progress of long work: a bar with rate and time left on a terminal, a line now and then in a log file.

Only the main process prints. This shows progress; it does not record it (`lm.run_folder` does).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

Advance = Callable[..., None]
_SECONDS_BETWEEN_LINES = 15.0


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f} {self.unit}/s" if task.speed else f"… {self.unit}/s", style="cyan")


class _TwoLines(Progress):
    """The bar, and under it the values that are shown, so that neither takes the other's room on a narrow terminal."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["shown"]:
                yield Text(f"  {task.fields['shown']}", no_wrap=True, overflow="ellipsis")


@contextmanager
def progress(
    total: int, *, label: str, unit: str = "it", done: int = 0, enabled: bool = True
) -> Iterator[Callable[..., None]]:
    """Show `label`, work done out of `total`, rate in `unit`/s and time left.

    Args:
        total: the amount of work; `done` of it was finished before (a resumed run): it does not count in the rate.
        enabled: False on every process but the first, and where the caller prints on its own.

    Yields:
        `advance(amount=1, **shown)`: more work is done; `shown` values appear under the bar.
    """
    if not enabled:
        yield lambda amount=1, **shown: None
    elif sys.stderr.isatty():
        yield from _bar(total, label, unit, done)
    else:
        yield from _lines(total, label, unit, done)


def _bar(total: int, label: str, unit: str, done: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6)),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        _Rate(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with _TwoLines(*columns, console=Console(stderr=True), expand=True) as bar:
        task = bar.add_task(label, total=total, completed=done, shown="")

        def advance(amount: float = 1, **shown: object) -> None:
            bar.update(task, advance=amount, shown=_format(shown))

        yield advance


def _lines(total: int, label: str, unit: str, done: int) -> Iterator[Advance]:
    start = last = time.monotonic()
    finished = float(done)

    def advance(amount: float = 1, **shown: object) -> None:
        nonlocal finished, last
        finished += amount
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES or (finished >= total and now - start >= 1):
            last = now
            rate = (finished - done) / max(now - start, 1e-9)
            left = (total - finished) / rate if rate > 0 else float("inf")
            line = f"{label}: {finished:,.0f}/{total:,.0f}  {rate:,.1f} {unit}/s  {left:,.0f} s left  {_format(shown)}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    yield advance


def _format(shown: dict[str, object]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )
