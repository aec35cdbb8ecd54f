"""How likely a model finds what another one said: nats a token of each answer after its prompt.

Asked of the untouched model it tells how far answers have gone from what that model would say. It does not tell whether they read
well (`unlearn.evaluation.legibility` does): an answer that was memorized has hardly any nats, and every other has many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lm.model import LanguageModel
from lm.prompts import PromptSpec, encode_prompt, max_positions
from unlearn.evaluation.utility import log_likelihoods
from unlearn.generation.batching import ONE_PROCESS, Workers, unless_sharded


def nats_per_token(
    model: LanguageModel,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    prompt: PromptSpec,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
    workers: Workers = ONE_PROCESS,
) -> list[float | None]:
    """The mean negative log-probability of each answer's tokens, in nats, as the model continues the prompt.

    The answer's text is tokenized by itself and put behind the prompt's tokens; the end of an answer is not scored, for an answer
    may have been cut. Where both are too long for the model the beginning of the prompt is left out, and of an answer that is
    too long by itself the end.

    Args:
        prompts, answers: the same number of both.
        prompt: how a prompt becomes tokens.
        batch_size: sequences a forward pass.
        progress: called with the number of answers done since the last call.
        workers: which process this is; each takes a share of the answers and all return all values.

    Returns:
        one number an answer, in order; None where there is no token to score.
    """
    limit = max_positions(model)
    pairs = []
    for text, answer in zip(prompts, answers, strict=True):
        before = encode_prompt(model.tokenizer, text, prompt)
        tokens = [int(token) for token in model.tokenizer(answer, add_special_tokens=False)["input_ids"]]
        pairs.append((before, tokens if limit is None else tokens[:limit]))
    workers = unless_sharded(workers, model)
    mine = workers.share(len(pairs))
    scored = [index for index in mine if pairs[index][1]]
    sums = log_likelihoods(model, [pairs[index] for index in scored], batch_size=batch_size, progress=progress)
    nats = {index: -float(sums[at]) / len(pairs[index][1]) for at, index in enumerate(scored)}
    return workers.gather([nats.get(index) for index in mine])
