"""Prove it: what a model still says about the forget and retain rows, scored as SemEval-2025 Task 4 does.

python scripts/evaluate.py --config configs/evaluate/builtin.yaml --model.path runs/mine/model --out runs/mine/evaluation
accelerate launch --config_file configs/accelerate/gpu8_ddp.yaml scripts/evaluate.py --config configs/evaluate/lume.yaml
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, whether or not the packages are installed

from lm.config import script
from lm.devices import is_main
from unlearn.evaluation.config import EvaluateConfig
from unlearn.evaluation.stage import describe, run_evaluate


def main(config: EvaluateConfig) -> None:
    result = run_evaluate(config)
    if is_main():
        print(describe(config, result))


if __name__ == "__main__":
    script(main, EvaluateConfig, description=__doc__)
