"""How deep did unlearning go? Put an unlearned model's streams into the original, layer by layer: does it still say the answers?

python scripts/depth.py --model.path runs/unlearn/model --out runs/depth
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/trace.py must not hide other modules

from lm.config import script
from lm.devices import is_main
from tracing.stages.depth.config import DepthConfig
from tracing.stages.depth.stage import describe, run_depth


def main(config: DepthConfig) -> None:
    result = run_depth(config)
    if is_main():
        print(describe(config, result))


if __name__ == "__main__":
    script(main, DepthConfig, description=__doc__)
