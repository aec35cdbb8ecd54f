"""What is left where it was stored? Trace the facts of an earlier trace again, in the model as it is after unlearning.

python scripts/retrace.py --before runs/trace --model.path runs/unlearn/model --out runs/retrace
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/trace.py must not hide other modules

from lm.config import script
from lm.devices import is_main
from tracing.stages.retrace.config import RetraceConfig
from tracing.stages.retrace.stage import describe, run_retrace


def main(config: RetraceConfig) -> None:
    result = run_retrace(config)
    if is_main():
        print(describe(config, result))


if __name__ == "__main__":
    script(main, RetraceConfig, description=__doc__)
