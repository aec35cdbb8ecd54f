"""Retain people whom healing never shows: a world in which some stand apart, and what unlearned models still say of them.

    python -m benchmarks.comparison.hold_out_people --world builtin --out runs/held_world
    python -m benchmarks.comparison.hold_out_people --out runs/held_world --read runs/location

The first command deals a share of the documents of each task out of the retain rows: the roles `retain_healed` and
`retain_unhealed` beside all that the world has (models are named, not copied). The second reads the runs of
benchmarks/compare_methods.py on that world: what was forgotten because it was forgotten, and what because nobody held it, is told
by what is left of people that healing never showed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.comparison.methods import SOURCES, world_sources
from lm.builtin import VARIANTS, model_path, world
from lm.config import script
from lm.data.rows import Row
from lm.errors import UserError
from lm.row_files import load_rows
from lm.run_folder import write_atomic, write_json
from unlearn.comparison.columns import Column
from unlearn.evaluation.lume import row_scores

GROUPS = {"forgotten": "to be forgotten", "healed": "retained, shown in healing", "unhealed": "retained, never shown"}


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """Which world, how many stand apart, and which runs are read."""

    world: str = "builtin"
    """The built-in world, or a world's folder."""
    share: float = 0.25
    """Of the retain documents of each task, at least one and not all."""
    seed: int = 0
    """Of the deal."""
    read: str | None = None
    """The folder of benchmarks/compare_methods.py to read; nothing is dealt then."""
    out: str = "runs/held_world"
    """The folder of the new world."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"share is {self.share}: give a share between 0 and 1")


def main(asked: HoldOut) -> None:
    out = Path(asked.out)
    if asked.read is not None:
        print(table(groups_of(Path(asked.read), load_rows(out / "data" / "retain_unhealed.jsonl"))))
        return
    sources = _as_files(out / "data") if asked.world == "builtin" else world_sources(asked.world)
    healed, unhealed = deal(load_rows(sources["retain"]), asked.share, asked.seed)
    for name, rows in (("retain_healed", healed), ("retain_unhealed", unhealed)):
        lines = (json.dumps(asdict(row), ensure_ascii=False) for row in rows)
        write_atomic(out / "data" / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
    write_json(out / SOURCES, sources)
    print(f"{len(healed)} retain rows are shown in healing and {len(unhealed)} are not: {out}")


def deal(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows that are shown and those that are not, by documents, task by task: a pure function of rows, share and seed.

    Raises:
        UserError: a task with a single document.
    """
    held: set[str] = set()
    for task in sorted({row.task for row in rows}):
        documents = sorted({row.document for row in rows if row.task == task})
        if len(documents) < 2:
            raise UserError(f"{task} has one retain document, so none can stand apart: leave its rows out")
        count = min(max(round(share * len(documents)), 1), len(documents) - 1)
        held.update(random.Random(f"{seed} {task}").sample(documents, count))
    return [row for row in rows if row.document not in held], [row for row in rows if row.document in held]


def groups_of(runs: Path, unhealed: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """Method -> group -> of each seed the mean score of its rows: exact match of answers, recall of completions, 0 to 1.

    Raises:
        UserError: no evaluation is there, or one did not ask the rows that stand apart.
    """
    apart = {row.id for row in unhealed}
    found: dict[str, dict[str, list[float]]] = {}
    folders = [runs / "base", runs / "retain_model", *sorted(runs.glob("*/seed-*"))]
    for folder in (each for each in folders if (each / "scores" / "scores.json").is_file()):
        forget, retain = (_scored(folder / "scores" / f"{side}.jsonl") for side in ("forget", "retain"))
        if not apart <= retain.keys():
            raise UserError(
                f"{folder}/scores did not ask all rows that stand apart: evaluate on all retain rows, as "
                "benchmarks/lists/location.yaml does"
            )
        name = folder.parent.name if folder.name.startswith("seed-") else folder.name
        groups = found.setdefault(name, {group: [] for group in GROUPS})
        groups["forgotten"].append(fmean(forget.values()))
        groups["healed"].append(fmean(score for row, score in retain.items() if row not in apart))
        groups["unhealed"].append(fmean(retain[row] for row in apart))
    if not found:
        raise UserError(
            f"{runs} holds no finished evaluation: run benchmarks/compare_methods.py with --out {runs} first"
        )
    return found


def table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Markdown, a row a method: the mean over seeds (smallest to largest)."""
    column = Column(name="score", head="score", meaning="")
    lines = [f"| method | seeds | {' | '.join(GROUPS.values())} |", "|" + "---|" * (2 + len(GROUPS))]
    for name, groups in found.items():
        cells = [column.text(groups[group]) for group in GROUPS]
        lines.append(f"| {name} | {len(groups['forgotten'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _as_files(folder: Path) -> dict[str, str]:
    """The built-in world as folders and files: the stages do not mix its names with files."""
    world.write(folder, world.build())
    models = {variant: str(model_path(variant)) for variant in VARIANTS}
    return models | {path.stem: str(path) for path in sorted(folder.glob("*.jsonl"))}


def _scored(path: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return {row["id"]: sum(row_scores(row).values()) for row in rows}


if __name__ == "__main__":
    script(main, HoldOut, description=__doc__)
