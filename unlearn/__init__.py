"""Take it out, and prove it: objectives x scope x trainer -> a checkpoint; evaluation -> scores; a report.

`unlearn.Scope` says what may change, `unlearn.objectives` what is minimized, `unlearn.stage.run_unlearn` does it from
files to files, `unlearn.evaluate` scores the result.
"""

from unlearn import objectives
from unlearn.evaluation.evaluate import evaluate
from unlearn.evaluation.result import Evaluation
from unlearn.scope.scope import Lora, Scope

__all__ = ["Evaluation", "Lora", "Scope", "evaluate", "objectives"]
