"""Where is it stored, by several ways to ask? Run localizers on the same facts, compare them, and choose layers if they agree.

python scripts/localize.py --config configs/localize/builtin.yaml --out runs/localize
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/localize.py must not hide other modules

from lm.config import script
from lm.devices import is_main
from tracing.question.fact_source import read_sources
from tracing.stages.localize.config import LocalizeConfig
from tracing.stages.localize.stage import run_localize


def main(config: LocalizeConfig) -> None:
    facts, retain = (
        read_sources(
            sources,
            columns=config.columns,
            tasks=config.tasks,
            subject=config.subject,
            leave_out_unnamed=config.leave_out_unnamed,
        )
        for sources in (config.sources, config.retain_sources)
    )
    result = run_localize(config, facts, retain)
    if is_main():
        for name, scores in result.scores.items():
            first = ", ".join(f"{kind} highest at layer {scores.mean(kind).argmax()}" for kind in config.plan.kinds)
            print(f"{name}: {scores.source}; {scores.unit}; {len(scores.facts)} facts; {first}")
            if checked := scores.details.get("verification"):
                print(f"  {checked['sentence']}")
        for name, reason in result.refused.items():
            print(f"{name}: no scores, compared without it: {reason}")
        print(f"\n{result.agreements.to_markdown()}")
        print(result.plan.verdict)
        print(f"wrote {config.out}/plan.json and localizers.png")


if __name__ == "__main__":
    script(main, LocalizeConfig, description=__doc__)
