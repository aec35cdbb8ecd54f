"""Take it out, and prove it: objectives x scope x trainer -> a model without it; scores; attacks; a report.

On objects in memory: `unlearn.unlearn` takes it out, `unlearn.evaluate` scores the result, `unlearn.attack` tries to bring it
back; `unlearn.Scope` says what may change, `unlearn.objectives` what is minimized. From files to files the same is
`run_unlearn`, `run_evaluate` and `run_attack`, each in the `stage` of its room.
"""

from lm.data.rows import Row
from lm.row_files import load_rows
from unlearn import objectives
from unlearn.attacks.attacking import attack
from unlearn.attacks.result import AttackResult
from unlearn.evaluation.evaluate import evaluate
from unlearn.evaluation.result import Evaluation
from unlearn.scope.scope import Lora, Scope
from unlearn.training.config import TrainerConfig
from unlearn.unlearning import Unlearned, unlearn

__all__ = [
    "AttackResult",
    "Evaluation",
    "Lora",
    "Row",
    "Scope",
    "TrainerConfig",
    "Unlearned",
    "attack",
    "evaluate",
    "load_rows",
    "objectives",
    "unlearn",
]
