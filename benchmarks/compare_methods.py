"""Many methods x seeds on one world, each through unlearn, evaluate and attack, to one table.

    python -m benchmarks.compare_methods --list benchmarks/lists/builtin.yaml --seeds '[1, 2, 3]' --workers 2 --out runs/compare
    palimpsest compare runs/compare --page docs/which_method.md --place builtin

The list is data: what every method has, how all are scored and attacked, and a row each of what sets it apart; `{forget}` and
its like in it stand for what the world has (`benchmarks/comparison/methods.py`). A world is the built-in one, a folder that
`python -m tools.builtin_model.build --seed N --out FOLDER` made, or any models and rows that the list names itself.
What is finished is not run again, so the same command goes on with what was broken off. A run that fails leaves its reason,
which stands in the table.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison.methods import Configs, MethodList
from benchmarks.comparison.running import run_methods, run_references
from lm.config import parse_config, script
from lm.errors import UserError, did_you_mean
from lm.run_folder import write_json
from unlearn.comparison import CompareConfig, run_compare


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is compared, where, and how much at once."""

    list: str
    """The YAML file with the methods."""
    world: str = "builtin"
    """The built-in world; a world's folder; `none` where the list names all models and rows itself."""
    sources: dict[str, str] | None = None
    """Role -> path, over those of the world and the list."""
    seeds: tuple[int, ...] = (1,)
    """Every method once with each: order of the rows, and whatever is drawn."""
    only: tuple[str, ...] = ()
    """Only these methods. Empty: all of the list."""
    attack: str | None = None
    """A YAML file, `quick` or `grid`; `none` for no attack. Null: as the list has it."""
    settings: dict[str, Any] | None = None
    """Dotted settings of every unlearning run, over the list's: {"trainer.steps": 3} for a trial of the list."""
    workers: int = 1
    """How many runs at once; they share the cores."""
    keep_models: bool = True
    """Keep the weights of the unlearned models when they have been attacked."""
    retry: bool = False
    """Try runs again that failed."""
    out: str = "runs/compare"
    """The folder: NAME/seed-N has the run, with its scores and attack inside; base, retain_model and trace stand beside them."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"workers is {self.workers}: give at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds is {[*self.seeds]}: give each once, and at least one")


def main(asked: Benchmark) -> None:
    listed = parse_config(MethodList, ["--config", asked.list])
    names = [method.name for method in listed.methods]
    for name in asked.only:
        if name not in names:
            raise UserError(f"the list has no method {name}{did_you_mean(name, names)}: it has {', '.join(names)}")
    out = Path(asked.out)
    configs = Configs.of(listed, asked.world, out, attack=asked.attack, sources=asked.sources, settings=asked.settings)
    chosen = [method for method in listed.methods if not asked.only or method.name in asked.only]
    made = [configs.made(method, seed) for method in chosen for seed in asked.seeds]  # all are read before any is run
    write_json(out / "benchmark.json", {"command": command()})
    run_references(configs, asked.workers)
    run_methods(
        made, asked.workers, keep_models=asked.keep_models, retry=asked.retry, say=lambda line: print(line, flush=True)
    )
    result = run_compare(
        CompareConfig(
            runs=(asked.out,),
            base=str(out / "base" / "scores"),
            retain_model=str(out / "retain_model" / "scores"),
            out=str(out / "table"),
        )
    )
    print(result.markdown)


def command() -> str:
    """What was typed."""
    return shlex.join(["python", "-m", "benchmarks.compare_methods", *sys.argv[1:]])


if __name__ == "__main__":
    script(main, Benchmark, description=__doc__)
