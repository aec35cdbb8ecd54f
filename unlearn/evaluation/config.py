"""One evaluation as data: a model, the rows it is asked, and how. What is done with it is `unlearn.evaluation.stage`."""

from __future__ import annotations

from dataclasses import dataclass, field

from lm.errors import UserError
from lm.model import ModelSpec
from lm.prompts import PromptSpec
from sae.activations.sources import NoSource, Source
from unlearn.evaluation.utility import Style
from unlearn.evaluation.word_overlap import Words
from unlearn.general_text import GeneralText

LM_EVAL = "lm_eval:"
HELP = """Prove it: what a model still says about the forget and retain rows, scored as SemEval-2025 Task 4 does.

palimpsest evaluate --config builtin --model.path runs/mine/model --out runs/mine/evaluation
accelerate launch --config_file "$(palimpsest configs accelerate/gpu8_ddp)" -m palimpsest evaluate --config lume
"""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which model is asked what, and where the answers go."""

    model: ModelSpec = field(default_factory=ModelSpec)
    """The model to score: base, unlearned, or any other."""
    forget: str = "builtin:forget"
    """Rows it should have forgotten: a JSONL or Parquet file, a folder of them, or a part of the built-in world."""
    retain: str = "builtin:retain"
    """Rows it should still know: likewise."""
    columns: dict[str, str] | None = None
    """For files with other column names: our field -> their column, e.g. {"input": "question", "output": "answer"}."""
    members: str | None = "builtin:forget"
    """Documents it was trained on: rows (completions are taken), or a file with a `document` column. Null: no membership."""
    nonmembers: str | None = "builtin:held_out"
    """Documents it was never trained on: likewise."""
    calibration: str | None = None
    """What an unlearning run was calibrated on: its documents are left out of the non-members, in which LUME has them too."""
    membership_task: str | None = "Task3"
    """Take member and non-member rows of this task only, as officially; null takes all tasks."""
    retain_scores: str | None = None
    """The folder of the retain model's finished evaluation, of the same documents: membership is judged beside it."""
    untouched: ModelSpec | None = None
    """The model before unlearning, which is asked how likely it finds the answers (`perplexity`). Null: it is not asked."""
    utility: str | None = "builtin:utility"
    """Questions (builtin:utility, a file in MMLU's layout), or lm_eval:TASK such as lm_eval:mmlu; null leaves it out."""
    utility_style: Style = "sentence"
    """sentence scores whole answers after "Question: ... Answer:"; letter scores A, B, C, D under MMLU's headline."""
    utility_per_subject: int | None = None
    """Only the first so many questions of each subject."""
    general: Source = field(default_factory=NoSource)
    """Text that has nothing to do with either side, for its perplexity: TextFiles, Datasets, Builtin; NoSource leaves it out."""
    general_longest: int = 256
    """Tokens; a longer general text is cut into pieces."""
    general_most: int = 400
    """At most so many pieces of general text, from the front of its source."""
    scores: tuple[str, ...] | None = None
    """Names of scores; what one is made of comes with it, and only what some score needs is asked. Null: all that can be had."""
    words: Words = "official"
    """What counts as a word of a completion: official (a to z and digits), or every_script, a variant for other scripts."""
    prompt: PromptSpec = field(default_factory=PromptSpec)
    """How prompts are rendered; raw is the official way."""
    max_new_tokens: int = 256
    """Longest answer in tokens; officially 256."""
    batch_size: int = 32
    """Sequences at once on each process."""
    out: str = "runs/evaluate"
    """The run folder; the numbers are in its scores.json, every answer in forget.jsonl and retain.jsonl."""
    resume: bool = False
    """Go on with the evaluation in `out`: parts that are done are not computed again."""

    def __post_init__(self) -> None:
        _ = self.general_text  # refuses what holds no text
        if (self.members is None) != (self.nonmembers is None):
            raise UserError("members and nonmembers belong together: give both, or set both to null")
        if self.retain_scores is not None and self.members is None:
            raise UserError(
                "retain_scores is for membership, and there are no members: give some, or leave retain_scores out"
            )
        if not self.forget.startswith("builtin"):
            for name in ("retain", "members", "nonmembers", "utility"):
                if (getattr(self, name) or "").startswith("builtin"):
                    raise UserError(
                        f"{name} is {getattr(self, name)} but forget is {self.forget}: the built-in {name} says nothing about "
                        f"other data: give your own{'' if name == 'retain' else ', or null to leave it out'}"
                    )
        for name in ("max_new_tokens", "batch_size", "utility_per_subject"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: give at least 1")
        if self.utility is not None and self.utility.startswith(LM_EVAL):
            if self.utility_style != "sentence":
                raise UserError(f"utility is {self.utility}, which has its own style: leave utility_style at sentence")
            if self.utility_per_subject is not None:
                raise UserError(f"utility is {self.utility}, which takes all questions: leave utility_per_subject out")

    @property
    def general_text(self) -> GeneralText:
        """The text whose perplexity is measured."""
        return GeneralText(source=self.general, longest=self.general_longest, most=self.general_most)
