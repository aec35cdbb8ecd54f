"""How deep did unlearning go? Put an unlearned model's streams into the original, layer by layer: does it still say the answers?

python scripts/depth.py --model.path runs/unlearn/model --out runs/depth
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/trace.py must not hide other modules

from lm.config import script
from tracing.question.fact_source import read_sources
from tracing.stages.depth.stage import DepthConfig, run_depth


def main(config: DepthConfig) -> None:
    facts = read_sources(
        config.sources,
        columns=config.columns,
        tasks=config.tasks,
        subject=config.subject,
        leave_out_unnamed=config.leave_out_unnamed,
    )
    report = run_depth(config, facts)
    print(report)
    print(f"wrote {config.out}/depth.json: what is lost by layer, and each fact's depth")


if __name__ == "__main__":
    script(main, DepthConfig, description=__doc__)
