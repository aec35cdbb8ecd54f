"""Where is it stored? Trace facts through a model, and choose the layers to train from what comes back.

python scripts/trace.py --config configs/trace/builtin.yaml --out runs/trace
accelerate launch --config_file configs/accelerate/gpu8_ddp.yaml scripts/trace.py --config configs/trace/lume.yaml
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/trace.py must not hide other modules

from lm.config import script
from lm.devices import is_main
from lm.errors import UserError
from tracing import Fact, facts_from_rows, load_known_facts
from tracing.config import TraceConfig
from tracing.stage import run_tracing
from unlearn.data import load_rows


def main(config: TraceConfig) -> None:
    result = run_tracing(config, read_facts(config))
    if is_main():
        effects, plan = result.effects, result.plan
        print(
            f"traced {len(effects.facts)} facts, left out {len(effects.skipped)} (reasons in {config.out}/effects.json)"
        )
        print(f"answer {effects.metric}: clean {effects.clean.mean():.4g}, corrupted {effects.corrupted.mean():.4g}")
        print(plan.verdict)
        print(
            f"wrote {config.out}/plan.json: layers {list(plan.layers)} of {effects.layers}, {' and '.join(plan.modules)}"
        )


def read_facts(config: TraceConfig) -> list[Fact]:
    """The facts of every source, in order."""
    facts: list[Fact] = []
    for source in config.sources:
        if is_known_facts(source):
            facts += load_known_facts(source)
            continue
        rows = load_rows(source, columns=config.columns)
        kept = [row for row in rows if not config.tasks or row.task in config.tasks]
        if not kept:
            have = ", ".join(sorted({row.task for row in rows}))
            raise UserError(
                f"{source} has no rows of {', '.join(config.tasks)} (it has {have}); set tasks to what it has"
            )
        facts += facts_from_rows(kept, config.subject)
    return facts


def is_known_facts(source: str) -> bool:
    """Whether a source is a JSON array of facts rather than rows: its first object has an `attribute`."""
    path = Path(source)
    if path.suffix != ".json" or not path.is_file():
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return '"attribute"' in file.read(4096)


if __name__ == "__main__":
    script(main, TraceConfig, description=__doc__)
