"""Generation: what the model says to each prompt, batched, the same text as one prompt at a time.

Badge: the greedy default is faithful to the official SemEval-2025 Task 4 evaluation (raw prompt, 256 new tokens, stop at
EOS, special tokens dropped, spaces before punctuation cleaned up). Nothing of the model's own generation config but its
EOS tokens is heeded, and in chat the token that ends an answer in the template; whoever wants other tokens than the
likeliest says how to choose them. Scoring the text is `unlearn.evaluation.lume`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import PromptSpec, answer_end, check_ids, encode_prompt, max_positions
from lm.shards import is_sharded
from unlearn.generation.batching import ONE_PROCESS, Workers, evaluating, sorted_batches

Progress = Callable[[int], object]
Choose = Callable[[Tensor, Sequence[int], int], Tensor]
"""(n, vocabulary) float32 logits, which prompts they continue, and how many tokens each has said, to (n,) token ids."""


def greedy(logits: Tensor, prompts: Sequence[int], said: int) -> Tensor:
    """The likeliest token."""
    return logits.argmax(dim=-1)


def generate(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    prompt: PromptSpec,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    progress: Progress | None = None,
    workers: Workers = ONE_PROCESS,
    choose: Choose = greedy,
) -> list[str]:
    """The model's continuation of each prompt, greedy unless `choose` says otherwise, in the order of `prompts`.

    Prompts are batched by length, padded on the left, masked, and numbered from each row's own first token; a row
    that has ended leaves the batch. In float32 the text equals that of one prompt at a time. In bfloat16 batches of
    another size round differently, so that a near-tie may fall the other way.

    Args:
        prompt: how a prompt becomes tokens; `PromptSpec()` (raw) is the official way.
        max_new_tokens: the most tokens a row may get. A row also ends where the model's context does.
        progress: called with the number of prompts finished since the last call.
        workers: which process this is. Each generates its own share of the prompts, and all return all texts. With
            sharded parameters (FSDP) every process must call this together.
        choose: the next tokens; for the same text from any batch and process it must look at each row by itself.

    Raises:
        UserError: a prompt that fills the model's context, or has a token that the model has no embedding for.
    """
    ids = [encode_prompt(model.tokenizer, text, prompt) for text in prompts]
    check_ids(model, ids)
    limit = max_positions(model)
    for text, tokens in zip(prompts, ids, strict=True):
        if limit is not None and len(tokens) >= limit:
            raise UserError(
                f'the prompt "{text[:40]}..." has {len(tokens)} tokens, which leaves no room for an answer in '
                f"the {limit} that {model.name} can read: shorten it"
            )
    room = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(tokens)) for tokens in ids]
    mine = workers.share(len(ids))
    batches = [
        [mine[place] for place in batch] for batch in sorted_batches([len(ids[row]) for row in mine], batch_size)
    ]
    together = is_sharded(model.model)
    if together:  # every process needs as many forward passes as the one with most rows
        most = -(-len(workers.with_index(0).share(len(ids))) // batch_size)
        batches += [[] for _ in range(most - len(batches))]
    stops = eos_ids(model)
    if prompt.format == "chat":
        stops |= {answer_end(model.tokenizer, prompt)[-1]}
    texts: dict[int, str] = {}
    with evaluating(model):
        for batch in batches:
            parts = [ids[row] for row in batch], [room[row] for row in batch]
            said = _continue(model, *parts, stops, together, _of(choose, batch))
            texts.update((row, _decode(model, tokens)) for row, tokens in zip(batch, said, strict=True))
            if progress is not None and batch:
                progress(len(batch))
    return workers.gather([texts[row] for row in mine])


def eos_ids(model: LanguageModel) -> frozenset[int]:
    """The tokens that end a generation: the tokenizer's EOS, and those of the model's generation config."""
    found: set[int] = set()
    config = getattr(model.model, "generation_config", None)
    for ids in (model.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        if ids is not None:
            found.update(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset(found)


def _continue(
    model: LanguageModel,
    prompts: list[list[int]],
    room: list[int],
    stops: frozenset[int],
    together: bool,
    choose: Choose,
) -> list[list[int]]:
    """The tokens of one batch of prompts, without the EOS; row i gets at most `room[i]`."""
    device = model.device
    said: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    width = max((len(ids) for ids in prompts), default=1)
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = None
    while _anyone(bool(alive), together, device):
        if not alive:  # sharded parameters: another process still needs this one's part of the weights
            model.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
            continue
        out = model.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        chosen = choose(out.logits[:, -1].float(), alive, len(said[alive[0]]))
        going = []
        for place, (row, token) in enumerate(zip(alive, chosen.tolist(), strict=True)):
            if token in stops:
                continue
            said[row].append(token)
            if len(said[row]) < room[row]:
                going.append(place)
        if 0 < len(going) < len(alive):
            kept = torch.tensor(going, device=device)
            cache.reorder_cache(kept)  # also of layers with a recurrent state
            chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
        alive = [alive[place] for place in going]
        tokens = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return said


def _of(choose: Choose, batch: Sequence[int]) -> Choose:
    """`choose` for places in a batch in place of prompts."""
    return lambda logits, places, said: choose(logits, [batch[place] for place in places], said)


def _anyone(busy: bool, together: bool, device: torch.device) -> bool:
    """Whether this process, or with sharded parameters any process, has rows that go on."""
    if not together:
        return busy
    flag = torch.tensor(int(busy), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def _decode(model: LanguageModel, tokens: list[int]) -> str:
    """Text without special tokens, and without the spaces before punctuation that the official decoding drops.

    The official script asks `decode` to clean up, which the transformers of its time did for every tokenizer; today's
    ignores it for BPE, so it is done here.
    """
    text = str(model.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return model.tokenizer.clean_up_tokenization(text)
