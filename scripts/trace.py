"""Where is it stored? Trace facts through a model, and choose the layers to train from what comes back.

python scripts/trace.py --config configs/trace/builtin.yaml --out runs/trace
accelerate launch --config_file configs/accelerate/gpu8_ddp.yaml scripts/trace.py --config configs/trace/lume.yaml
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/trace.py must not hide other modules

from lm.config import script
from lm.devices import is_main
from tracing import Agreement
from tracing.question.fact_source import read_facts
from tracing.stages.trace.config import TraceConfig
from tracing.stages.trace.stage import run_trace


def main(config: TraceConfig) -> None:
    result = run_trace(config, read_facts(config))
    if is_main():
        effects, plan = result.effects, result.plan
        print(
            f"traced {len(effects.facts)} facts, left out {len(effects.skipped)} (reasons in {config.out}/effects.json)"
        )
        first = type(config.corruption).__name__
        for name, traced in {first: effects, **result.others}.items():
            for read in (traced, *traced.also.values()):
                print(f"{name}: {read.summary(confidence=config.plan.confidence, seed=config.seed)}")
        for name, said in plan.evidence.get("also", {}).items():
            for alike in said.get("agreement", {}).values():
                print(f"{first} and {name}, {Agreement(**alike)}")
        for said in plan.evidence.get("windows", ()):
            print(said)
        print(plan.verdict)
        print(
            f"wrote {config.out}/plan.json: layers {list(plan.layers)} of {effects.layers}, {' and '.join(plan.modules)}"
        )


if __name__ == "__main__":
    script(main, TraceConfig, description=__doc__)
