"""The main job on the built-in model: trace, choose layers, unlearn, score, report.

python scripts/demo.py --config configs/demo.yaml --out runs/demo
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/unlearn.py must not hide the package

from lm.config import script
from unlearn.demo.config import DemoConfig
from unlearn.demo.stage import check_results, run_demo


def main(config: DemoConfig) -> None:
    report = run_demo(config)
    check_results(report.parent)
    print(f"wrote {report} and {report.parent / 'results.json'}")


if __name__ == "__main__":
    script(main, DemoConfig, description=__doc__)
