"""Does it come back? Attack an unlearned model, and beside it the retain model, and compare what they say.

python scripts/attack.py --config configs/attack/builtin.yaml --model.path runs/mine/model --out runs/mine-attack
accelerate launch scripts/attack.py --model.path MODEL --retain_model.path RETAIN_MODEL --forget … --retain …
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/unlearn.py must not hide the package

from lm.config import script
from lm.devices import is_main
from unlearn.attacks import AttackConfig, run_attack


def main(config: AttackConfig) -> None:
    result = run_attack(config)
    if is_main():
        print(result)
        print(f"wrote {config.out}/attack.json and attack.png")


if __name__ == "__main__":
    script(main, AttackConfig, description=__doc__)
