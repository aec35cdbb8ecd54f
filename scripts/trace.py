"""Where is it stored? Trace facts through a model, and choose the layers to train from what comes back.

python scripts/trace.py --config configs/trace/builtin.yaml --out runs/trace
accelerate launch --config_file configs/accelerate/gpu8_ddp.yaml scripts/trace.py --config configs/trace/lume.yaml
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/trace.py must not hide other modules

from lm.config import script
from lm.devices import is_main
from tracing.stages.trace.config import TraceConfig
from tracing.stages.trace.stage import describe, run_trace


def main(config: TraceConfig) -> None:
    result = run_trace(config)
    if is_main():
        print(describe(config, result))


if __name__ == "__main__":
    script(main, TraceConfig, description=__doc__)
