"""Does it come back? Attacks on an unlearned model, each beside the same attack on the retain model.

The retain model never saw the forget rows. `run_attack` drives any attack from files, `attack` on models in memory;
`AttackConfig` says on what. So far there is one: `Relearning`.
"""

from unlearn.attacks.attacking import attack
from unlearn.attacks.base import Attack
from unlearn.attacks.config import AttackConfig
from unlearn.attacks.relearning import Relearning
from unlearn.attacks.result import AttackResult
from unlearn.attacks.stage import run_attack

__all__ = ["Attack", "AttackConfig", "AttackResult", "Relearning", "attack", "run_attack"]
