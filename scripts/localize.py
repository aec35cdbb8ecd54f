"""Where is it stored, by several ways to ask? Run localizers on the same facts, compare them, and choose layers if they agree.

python scripts/localize.py --config configs/localize/builtin.yaml --out runs/localize
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/localize.py must not hide other modules

from lm.config import script
from lm.devices import is_main
from tracing.stages.localize.config import LocalizeConfig
from tracing.stages.localize.stage import describe, run_localize


def main(config: LocalizeConfig) -> None:
    result = run_localize(config)
    if is_main():
        print(describe(config, result))


if __name__ == "__main__":
    script(main, LocalizeConfig, description=__doc__)
