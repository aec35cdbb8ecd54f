"""One report as data: which runs, what their models are called, where the page goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lm.errors import UserError

HELP = """One self-contained page from any run folders: where it was stored, whether it is gone, and how we know.

palimpsest report runs/mine
palimpsest report runs/trace runs/mine runs/mine-evaluation runs/mine-attack --out report.html
palimpsest report runs/a runs/b --retain_model runs/retain-evaluation --labels '{"runs/a": "Joint", "runs/b": "NPO"}'
"""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The runs that a page is made from. Runs of one model are joined by the path of the model that they record."""

    runs: tuple[str, ...] = ()
    """Run folders of any stages (trace, unlearn, evaluate, attack, retrace, depth), or folders that hold some."""
    labels: dict[str, str] | None = None
    """Run folder -> the name of its model on the page. Others are called after their folder."""
    retain_model: str | None = None
    """The run folder with an evaluation of the retain model, which never saw the forget rows. Null: as the runs say."""
    out: str = "runs/report.html"
    """The page; one that is there is replaced. A folder, which is there or has no suffix: `report.html` in it."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs is empty: name at least one run folder, as in palimpsest report runs/mine")

    @property
    def page(self) -> Path:
        """The file that is written."""
        out = Path(self.out)
        return out / "report.html" if out.is_dir() or not out.suffix else out
