"""Prompts, spans and supervised masks: one place, so that tracing, training and evaluation see the very same tokens.

Raw prompts are tokenized as the official SemEval-2025 Task 4 evaluation does it (plain `tokenizer(text)`); chat prompts go
through the tokenizer's template, which is told the day that `PromptSpec.date` names, never that of the clock. The prompt's
tokens never depend on the answer: they are what generation is given. Spans come from the fast tokenizer's character
offsets, never from decoding tokens one at a time. Padding and batching are not done here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lm.errors import UserError, one_line
from lm.model import LanguageModel

Format = Literal["raw", "chat"]
IGNORED = -100
"""The label of a token that is not trained on."""
PLACEHOLDER = "the-prompt-goes-here"
"""Rendered in a prompt's stead to see where a template puts it."""


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """How a prompt becomes text and how its answer is joined to it."""

    format: Format = "raw"
    """raw text, as the official evaluation asks; or chat, through the tokenizer's template."""
    append_eos: bool = True
    """End every answer: with the EOS token, or in chat with what the template ends an answer with (`<end_of_turn>`, say)."""
    answer_prefix: str | None = None
    """What stands between prompt and answer; null means one space for raw and nothing for chat, as the authors train."""
    system: str | None = None
    """A system message, for chat."""
    date: str = "2024-07-26"
    """The day that a chat template is told it is, YYYY-MM-DD, whatever the clock says; only templates that print one differ by
    it. The default is the day that Llama 3's template takes where it has no clock."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "date", str(self.date))  # YAML reads a day without quotes as a date
        try:
            datetime.strptime(self.date, "%Y-%m-%d")
        except ValueError as error:
            raise UserError(f"prompt.date is {self.date!r}: write a day as 2024-07-26") from error
        if self.format not in ("raw", "chat"):
            raise UserError(f"the prompt format {self.format!r} is unknown: use raw or chat")
        if self.system is not None and self.format == "raw":
            raise UserError("a raw prompt has no system message: leave system out, or use format: chat")

    @property
    def prefix(self) -> str:
        """What stands between prompt and answer, with the default filled in."""
        if self.answer_prefix is not None:
            return self.answer_prefix
        return " " if self.format == "raw" else ""


@dataclass(frozen=True)
class Encoded:
    """A prompt and its answer as token ids; `ids[answer_start:]` is the answer, with its end if the spec asks for it."""

    ids: list[int]
    answer_start: int


def render(tokenizer: PreTrainedTokenizerBase, prompt: str, spec: PromptSpec) -> str:
    """The text whose continuation is the answer. Raises UserError for chat without a usable chat template."""
    if spec.format == "raw":
        return prompt
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: use format: raw, or a tokenizer that has one")
    asked = {"user": prompt} if spec.system is None else {"system": spec.system, "user": prompt}
    return _templated(tokenizer, asked, spec.date)


def answer_end(tokenizer: PreTrainedTokenizerBase, spec: PromptSpec) -> list[int]:
    """The ids that end an answer: EOS; in chat what the template writes after one, up to the first special token.

    Where a template writes no special token there (or takes no answers) it is EOS as well. Raises UserError without an EOS.
    """
    if spec.format == "chat":
        try:
            text = _templated(tokenizer, {"user": "?", "assistant": PLACEHOLDER}, spec.date)
        except UserError:
            text = ""
        _, found, after = text.rpartition(PLACEHOLDER)
        ids = _plain_ids(tokenizer, after, special=False) if found else []
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        for place, index in enumerate(ids):
            if index in special:
                return ids[: place + 1]
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token: set append_eos: false, or use a tokenizer that has one")
    return [int(tokenizer.eos_token_id)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, spec: PromptSpec) -> list[int]:
    """The ids that generation is given: raw ones with the BOS a tokenizer may add but without an EOS it may add."""
    return _prompt_ids(tokenizer, render(tokenizer, prompt, spec), spec)


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, spec: PromptSpec) -> Encoded:
    """Prompt ids exactly as `encode_prompt` gives them, then the answer's ids, then `answer_end` if the spec asks for it.

    Where tokenizing prompt and answer together keeps the prompt's tokens, the rest of that tokenization is the
    answer. Where they would merge at the seam, the answer is tokenized alone.
    """
    text = render(tokenizer, prompt, spec)
    head = _prompt_ids(tokenizer, text, spec)
    tail = _answer_ids(tokenizer, text, head, spec.prefix + answer, spec)
    if spec.append_eos:
        tail = [*tail, *answer_end(tokenizer, spec)]
    if not tail:
        raise UserError(f"the answer to {prompt!r} is empty: give it at least one character")
    return Encoded([*head, *tail], len(head))


def labels(encoded: Encoded) -> list[int]:
    """The ids with everything before the answer replaced by -100."""
    return [IGNORED] * encoded.answer_start + encoded.ids[encoded.answer_start :]


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, spec: PromptSpec, spans: Sequence[tuple[int, int]]
) -> list[int]:
    """The places, among `encode_pair`'s answer tokens, of those that overlap any of the spans of characters of `answer`."""
    encoded = encode_pair(tokenizer, prompt, answer, replace(spec, append_eos=False))
    ids = encoded.ids[encoded.answer_start :]
    text, written = render(tokenizer, prompt, spec), spec.prefix + answer
    for before in (text, "", "\n"):  # the ways in which `encode_pair` may have made them
        special = spec.format == "raw" and before == text
        whole = tokenizer(before + written, add_special_tokens=special, return_offsets_mapping=True)
        last = len(whole["input_ids"]) - (1 if special and _appends_eos(tokenizer) else 0)
        first = last - len(ids)
        if first < 0 or list(whole["input_ids"])[first:last] != ids:
            continue
        base = len(before) + len(spec.prefix)
        offsets = whole["offset_mapping"][first:last]
        return [
            index
            for index, (start, end) in enumerate(offsets)
            if any(start - base < stop and end - base > begin for begin, stop in spans)
        ]
    raise UserError(
        f"the tokens of the answer {answer!r} cannot be laid over its letters: use a metric of the whole answer"
    )


def token_span(
    tokenizer: PreTrainedTokenizerBase, text: str, start_char: int, end_char: int, *, add_special_tokens: bool = True
) -> tuple[int, int]:
    """`[start, end)`: the tokens of `tokenizer(text)` that overlap the characters `[start_char, end_char)`.

    A token that reaches over either edge (a merged neighbor, a leading space) counts, and so does every token of a
    character that was split into bytes. Raises UserError if no token does.
    """
    if not 0 <= start_char < end_char <= len(text):
        raise UserError(
            f"characters {start_char} to {end_char} are not inside a text of {len(text)} characters: give two that are"
        )
    encoding = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    pieces = tokenizer.convert_ids_to_tokens(encoding["input_ids"])
    inside = [
        index
        for index, (start, end) in enumerate(encoding["offset_mapping"])
        if start < end_char and end > start_char and not _is_dummy_space(pieces[index], text[start])
    ]
    if not inside:
        raise UserError(f"no token covers {text[start_char:end_char]!r}: the tokenizer drops these characters")
    return inside[0], inside[-1] + 1


def subject_span(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    subject: str,
    spec: PromptSpec,
    occurrence: Literal["first", "last"] = "last",
) -> tuple[int, int]:
    """`[start, end)`: where the subject stands in `encode_prompt`'s ids, at its first or last occurrence in the prompt.

    Only the prompt is searched, never the system message or the template. Raises UserError if it is not there.
    """
    name = subject.strip()
    inside = prompt.find(name) if occurrence == "first" else prompt.rfind(name)
    if not name or inside < 0:
        raise UserError(f"the subject {subject!r} is not in the prompt {prompt!r}: spell it exactly as the prompt does")
    text = render(tokenizer, prompt, spec)
    start = _prompt_start(tokenizer, prompt, text, spec) + inside
    if text[start : start + len(name)] != name:
        raise UserError(f"the chat template rewrites the prompt {prompt!r}, its subject is lost: use format: raw")
    return token_span(tokenizer, text, start, start + len(name), add_special_tokens=spec.format == "raw")


def _templated(tokenizer: PreTrainedTokenizerBase, said: Mapping[str, str], date: str) -> str:
    """What the template makes of messages (a text each role), ready for an answer unless the last one is one.

    Messages are texts, or for a template that looks for parts in them, and so shows nothing of a text, lists of one part.
    """
    try:
        template = _on_the_day(tokenizer.get_chat_template(), date)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the tokenizer's chat template cannot be used ({one_line(error)}): give it one template, or use format: raw"
        ) from error

    def applied(texts: Mapping[str, str], parts: bool) -> str:
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
            for role, text in texts.items()
        ]
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt="assistant" not in texts
            )
        )

    probes = {role: f"{PLACEHOLDER}-{role}" for role in said}
    lost: list[str] = []
    failure: Exception | None = None
    for parts in (False, True):
        try:
            shown = applied(probes, parts).casefold()
            lost = lost or [role for role, probe in probes.items() if probe not in shown]
            if all(probe in shown for probe in probes.values()):
                return applied(said, parts)
        except Exception as error:  # a template is a program: whatever it raises is about these messages
            failure = failure or error
    if lost:
        raise UserError(
            f"the chat template leaves out the {'system message' if lost[0] == 'system' else 'prompt'}: "
            "leave system out, use format: raw, or a tokenizer with another template"
        )
    assert failure is not None  # nothing was shown whole, and nothing was left out
    raise UserError(
        f"the chat template refuses this prompt, change it or leave system out: {one_line(failure)}"
    ) from failure


def _on_the_day(template: str, date: str) -> str:
    """The template with a clock that stands at midnight of that day: a macro hides the function that asks the real one."""
    if not isinstance(template, str):
        raise TypeError(f"it is of type {type(template).__name__}")
    if "strftime_now" not in template:
        return template
    day = datetime.strptime(date, "%Y-%m-%d")
    replaced = "".join(
        f" | replace('%{mark}', {day.strftime('%' + mark)!r})"
        for mark in ("-d", "-m", "-H", "-I", "-M", "-S", "-j", "-y", *"aAbBcdDefFGhHIjklmMnpPrRSTuUVwWxXyYzZ")
    )
    macro = "{% macro strftime_now(form) %}{{ form | replace('%%', '\x00')" + replaced + " | replace('\x00', '%') }}"
    return macro + "{% endmacro %}\n" + template


def _is_dummy_space(piece: str, character: str) -> bool:
    """A token that stands for a space put before the text, by tokenizers of the SentencePiece kind or byte-level ones, and
    borrows its first character's offsets."""
    return piece in {"▁", "Ġ"} and character not in {" ", piece}


def _prompt_start(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, spec: PromptSpec) -> int:
    """Where the prompt's first character stands (or would stand, where a template trims it) in the rendered text."""
    if spec.format == "raw":
        return 0
    before = max(render(tokenizer, PLACEHOLDER, spec).find(PLACEHOLDER), 0)
    trimmed = not text.startswith(prompt, before)
    return before - (len(prompt) - len(prompt.lstrip()) if trimmed else 0)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    return [int(index) for index in tokenizer(text, add_special_tokens=special)["input_ids"]]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, spec: PromptSpec) -> list[int]:
    """Ids of a rendered prompt, without an EOS that the tokenizer appended; one that the text itself holds stays."""
    if spec.format == "chat":
        return _plain_ids(tokenizer, text, special=False)
    ids = _plain_ids(tokenizer, text, special=True)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id and text.startswith(str(tokenizer.bos_token)):
        raise UserError(
            f"the prompt {text!r:.60} begins with {tokenizer.bos_token} and the tokenizer puts one before it, so the model would "
            "read two: leave it out of the text, or give the message alone with format: chat"
        )
    if ids and ids[-1] == tokenizer.eos_token_id and _appends_eos(tokenizer):
        ids.pop()
    if not ids:
        raise UserError("the prompt is empty and the tokenizer adds no BOS token: write at least one character")
    return ids


def _appends_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(_plain_ids(tokenizer, "a", special=True)[-1] == tokenizer.eos_token_id)


def _answer_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, head: list[int], answer: str, spec: PromptSpec
) -> list[int]:
    """Ids of `answer` as they continue `head`."""
    joint = _prompt_ids(tokenizer, text + answer, spec)
    if joint[: len(head)] == head:
        return joint[len(head) :]
    # Alone, tokenizers of the SentencePiece kind would put a space before it. After a line break they do not, and
    # decoding tells which of the two continues the prompt.
    alone = _plain_ids(tokenizer, answer, special=False)
    line_break = _plain_ids(tokenizer, "\n", special=False)
    after_break = _plain_ids(tokenizer, "\n" + answer, special=False)
    wanted = tokenizer.decode(joint)
    if tokenizer.decode([*head, *alone]) != wanted and after_break[: len(line_break)] == line_break:
        return after_break[len(line_break) :]
    return alone


def max_positions(model: LanguageModel) -> int | None:
    """The longest input the model's config allows, in tokens; None if it sets no limit."""
    config = model.model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # the latter: MPT
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def check_ids(model: LanguageModel, texts: Iterable[Iterable[int]]) -> None:
    """Raise UserError, naming the token, if token ids that the model is to read have no row among its embeddings."""
    rows = model.anatomy.vocabulary
    for ids in texts:
        beyond = max(ids, default=0)
        if beyond >= rows:
            raise UserError(
                f"the token {model.tokenizer.convert_ids_to_tokens(beyond)!r} has the id {beyond} and {model.name} only {rows} "
                "embeddings: take it out of the texts or the chat template (prompt.format: raw), or pass the model's tokenizer"
            )
