"""Ask one model all that its scores need (generations, document losses, multiple-choice questions), then compute the scores.

`evaluate` works on objects in memory; asking is `unlearn.evaluation.measure`, all arithmetic is in `unlearn.evaluation.scores`
and the modules behind it. The stage that goes from files to files through it is `unlearn.evaluation.stage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lm.data.rows import Question, Row
from lm.errors import UserError
from lm.loading import load
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from lm.row_files import load_documents, load_questions, load_rows
from unlearn.evaluation.evaluation_set import EvaluationSet
from unlearn.evaluation.measure import Measuring
from unlearn.evaluation.result import Evaluation, finished_losses
from unlearn.evaluation.scores.base import Losses, Score, needs_of
from unlearn.evaluation.utility import Style
from unlearn.evaluation.word_overlap import Words
from unlearn.general_text import GeneralText
from unlearn.generation.batching import ONE_PROCESS, Workers

OFFICIAL_PROMPT = PromptSpec()


def evaluate(
    model: LanguageModel | str,
    forget: Sequence[Row] | str,
    retain: Sequence[Row] | str,
    *,
    members: Sequence[str] | str = (),
    nonmembers: Sequence[str] | str = (),
    questions: Sequence[Question] | str = (),
    scores: Sequence[str | Score] | None = None,
    prompt: PromptSpec = OFFICIAL_PROMPT,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    style: Style = "sentence",
    lm_eval: str | None = None,
    retain_scores: Evaluation | Losses | str | None = None,
    untouched: LanguageModel | str | None = None,
    general: GeneralText = GeneralText(),  # noqa: B008 (frozen)
    words: Words = "official",
    store: Path | str | None = None,
    workers: Workers = ONE_PROCESS,
    show: bool = False,
) -> Evaluation:
    """Ask a model what some scores need, and compute them. The model is left as it was.

    Args:
        model: a loaded model, or what `lm.load` takes: `builtin`, a folder, a hub id.
        forget, retain: rows to generate on (no id on both sides), or a source of them: a file, a folder, `builtin:forget`.
        members, nonmembers: whole documents that the model was, and was not, trained on, or sources of them. Both or neither;
            without them membership is not scored.
        questions: multiple-choice questions, or a source of them such as `builtin:utility`; without them utility is not scored.
        scores: the names of scores, or objects of your own class; parts of a score come with it (`["final"]` gives all that is
            official). None: every score of `unlearn.evaluation.scores` that can be had from what is given.
        prompt: how prompts are rendered; the default is the official raw text.
        max_new_tokens: the longest answer; officially 256.
        batch_size: prompts generated at once. Documents and questions go through in batches of the same size.
        style: how questions are asked (see `unlearn.evaluation.utility`).
        lm_eval: ask through lm-eval instead: the name of one of its tasks, or, with `questions`, any name at all.
        retain_scores: what the retain model, which never saw the forget rows, came to on the same members and non-members: its
            evaluation, its losses, or the folder of its finished evaluation. Without it membership is not judged beside it.
        untouched: the model before unlearning, or what `lm.load` takes: it says how likely it finds the answers. Without it they
            have no perplexity.
        general: text whose perplexity is measured.
        words: what counts as a word of a completion: official (a to z and digits alone), or every_script, a variant.
        store: a folder where each part is written as soon as it is done, and from which parts that are already there
            are read instead of computed, so that an interrupted evaluation can go on.
        workers: which process this is; all processes return the same result, and the first writes.
        show: show progress on the first process.

    Returns:
        the values by name, the same example by example, and every generation, loss and choice behind them: as many
        generations as rows, as many losses as documents.

    Raises:
        UserError: rows that a score cannot read, a score whose needs are not given, a file that is missing, a store of
            another evaluation, a retain model's losses of other documents.

    Example:
        >>> import unlearn
        >>> from lm.row_files import load_rows
        >>> forget, retain = load_rows("builtin:forget")[:4], load_rows("builtin:retain")[:4]
        >>> result = unlearn.evaluate("builtin", forget, retain, max_new_tokens=8)
        >>> len(result.forget), result.values["mia_auc"]
        (4, None)
    """
    evaluation_set = EvaluationSet(
        forget=load_rows(forget) if isinstance(forget, str) else tuple(forget),
        retain=load_rows(retain) if isinstance(retain, str) else tuple(retain),
        members=load_documents(members) if isinstance(members, str) else tuple(members),
        nonmembers=load_documents(nonmembers) if isinstance(nonmembers, str) else tuple(nonmembers),
        questions=load_questions(questions) if isinstance(questions, str) else tuple(questions),
        style=style,
        lm_eval=lm_eval,
        retain_losses=_losses(retain_scores),
        untouched=untouched is not None,
        general=general,
        words=words,
    )
    wanted = evaluation_set.askable(scores)
    evaluation_set.check_harness(wanted)
    loaded = load(model) if isinstance(model, str) else model
    measuring = Measuring(
        loaded,
        load(untouched) if isinstance(untouched, str) else untouched,
        evaluation_set,
        prompt,
        max_new_tokens,
        batch_size,
        None if store is None else Path(store),
        workers,
        show,
    )
    statistics = measuring.statistics({need for score in wanted for need in needs_of(score)})
    return Evaluation(
        values={score.name: statistics.of(score) for score in wanted},
        examples={score.name: values for score in wanted if (values := statistics.examples_of(score))},
        statistics=statistics,
        seconds=measuring.parts.seconds,
    )


def _losses(retain_scores: Evaluation | Losses | str | None) -> Losses | None:
    """The losses behind what is given of the retain model."""
    if isinstance(retain_scores, str):
        return finished_losses(retain_scores)
    if not isinstance(retain_scores, Evaluation):
        return retain_scores
    if retain_scores.statistics.losses is None:
        raise UserError("retain_scores has no losses: evaluate the retain model with members and nonmembers")
    return retain_scores.statistics.losses
