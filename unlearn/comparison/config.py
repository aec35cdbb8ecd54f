"""One comparison as data: which runs, and where their table goes."""

from __future__ import annotations

import json
import shlex
from dataclasses import MISSING, dataclass, fields

from lm.errors import UserError, did_you_mean
from unlearn.comparison.columns import COLUMNS

HELP = """One table from run folders, a row a method: what it forgot, what it kept, what an attack brought back, what it cost.

palimpsest compare runs/compare
palimpsest compare runs/mine runs/mine-evaluation runs/mine-attack runs/retain-evaluation --out runs/table
palimpsest compare runs/compare --page docs/which_method.md --place builtin
"""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The runs that a table is made from.

    Runs of one model are joined by the path of the model that they record; models that were made with equal settings but for the
    seed are one row.
    """

    runs: tuple[str, ...] = ()
    """Run folders of the stages unlearn, evaluate and attack, or folders that hold some."""
    retain_model: str | None = None
    """The run folder with an evaluation of the retain model, which never saw the forget rows. Null: as the attacks say."""
    base: str | None = None
    """The run folder with an evaluation of the model before unlearning. Null: as the unlearning runs say."""
    labels: dict[str, str] | None = None
    """Run folder -> the name of its method in the table. Others are called after their folder."""
    columns: tuple[str, ...] | None = None
    """Columns to show, by name, in this order. Null: all in which some run has a value."""
    also: tuple[str, ...] = ()
    """Further scores of the evaluations to show as columns, by their names in scores.json."""
    page: str | None = None
    """A Markdown file that the table is written into as well, between two marker lines; what stands around them stays."""
    place: str = "table"
    """Which marker lines of the page: `<!-- table: PLACE -->` and `<!-- end of table: PLACE -->`."""
    out: str = "runs/comparison"
    """The folder for comparison.json and comparison.md; what is there is replaced."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs is empty: name at least one run folder, as in palimpsest compare runs/compare")
        known = [column.name for column in COLUMNS]
        for name in self.columns or ():
            if name not in (*known, *self.also):
                raise UserError(
                    f"there is no column {name!r}{did_you_mean(name, known)}: take some of {', '.join(known)}, or name it in also"
                )
        for name in self.also:
            if name in known:
                raise UserError(f"also names {name}, which is a column already: leave it out")
        if "\n" in self.place or "-->" in self.place or not self.place:
            raise UserError(f"place is {self.place!r}: give a name on one line")

    @property
    def command(self) -> str:
        """What to type for this table."""
        words = ["palimpsest", "compare", *self.runs]
        for field in fields(self):
            value = getattr(self, field.name)
            usual = field.default if field.default is not MISSING else None
            if field.name != "runs" and value != usual:
                plain = list(value) if isinstance(value, tuple) else value
                words += [f"--{field.name}", plain if isinstance(plain, str) else json.dumps(plain)]
        return shlex.join(words)
