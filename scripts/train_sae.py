"""Look inside: train sparse autoencoders on the activations of a language model.

python scripts/train_sae.py --config configs/sae/builtin.yaml --out runs/sae
accelerate launch --config_file configs/accelerate/cpu2_ddp.yaml scripts/train_sae.py --config configs/sae/builtin.yaml
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout: scripts/ must not hide other modules

from lm.config import script
from lm.devices import is_main
from sae.trainer import TrainSaeConfig, run_train_sae


def main(config: TrainSaeConfig) -> None:
    folders = run_train_sae(config)
    if not is_main() or not folders:
        return
    results = json.loads((Path(config.out) / "results.json").read_text())
    for name, folder in folders.items():
        measures = results[name]
        said = ", ".join(
            f"{key} {measures[key]:.4g}"
            for key in ("fvu", "l0", "fvu_exported", "l0_exported", "dead", "ce_recovered")
            if key in measures
        )
        print(f"wrote {folder}" + (f": held out {said}" if said else ""))


if __name__ == "__main__":
    script(main, TrainSaeConfig, description=__doc__)
