"""Prompts: the same tokens everywhere, and spans that hold for multi-byte, merged and repeated subjects."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from itertools import product
from typing import Any

import pytest
from families import CHAT as CHAT_TEMPLATE
from families import byte_level, metaspace
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lm import PromptSpec, UserError, encode_pair, encode_prompt, labels, render, subject_span, token_span
from lm.prompts import answer_end, answer_tokens

RAW, CHAT = PromptSpec(), PromptSpec(format="chat")
KINDS: dict[str, Callable[..., PreTrainedTokenizerFast]] = {
    "bpe": byte_level,
    "bpe_untrimmed": lambda **more: byte_level(trim_offsets=False, **more),
    "bpe_bos": lambda **more: byte_level(bos=True, **more),
    "bpe_bos_eos": lambda **more: byte_level(bos=True, eos=True, **more),
    "metaspace": lambda **more: metaspace(bos=False, **more),
    "metaspace_bos": metaspace,
    "metaspace_split": lambda **more: metaspace(normalize=False, **more),
}
SPECS = {"raw": RAW, "chat": CHAT, "chat_system": PromptSpec(format="chat", system="You know Anna Kowalska. Answer.")}
TOKENIZERS = {name: make() for name, make in KINDS.items()}
FULL = PromptSpec(append_eos=False)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> PromptSpec:
    return SPECS[request.param]


# --- rendering and encoding ------------------------------------------------------------------------------------------


def test_raw_is_the_prompt_and_chat_is_the_template() -> None:
    tokenizer = byte_level()
    assert render(tokenizer, "Who? ", RAW) == "Who? "
    assert render(tokenizer, "Who? ", CHAT) == "<|user|>\nWho?\n<|assistant|>\n"
    assert render(tokenizer, "Who?", replace(CHAT, system="Be brief.")).startswith(
        "<|system|>\nBe brief.\n<|user|>\nWho?"
    )


def test_raw_prompts_are_tokenized_as_the_official_evaluation_does() -> None:
    """Plain `tokenizer(text)`, so with BOS where it adds one; an EOS that it adds is not part of a prompt."""
    text = "Where was Anna Kowalska born?"
    bare = byte_level()(text)["input_ids"]
    assert encode_prompt(byte_level(), text, RAW) == bare
    assert encode_prompt(byte_level(bos=True), text, RAW) == [1, *bare]
    assert byte_level(bos=True, eos=True)(text)["input_ids"] == [1, *bare, 2]
    assert encode_prompt(byte_level(bos=True, eos=True), text, RAW) == [1, *bare]
    assert encode_prompt(byte_level(eos=True), text, RAW) == bare


def test_an_eos_that_the_prompt_itself_holds_stays() -> None:
    for make in (byte_level, lambda: byte_level(eos=True)):
        ids = encode_prompt(make(), "Hello</s>", RAW)
        assert ids[-1] == 2
        assert ids.count(2) == 1


def test_chat_prompts_get_no_special_tokens_beside_the_template() -> None:
    tokenizer = byte_level(bos=True, eos=True)
    ids = encode_prompt(tokenizer, "Who?", CHAT)
    assert tokenizer.decode(ids) == "<|user|>\nWho?\n<|assistant|>\n"


ANSWERS = ("in Gdańsk", "Łódź", "1984-03-12", "zoe@example.com", "555-0137", "🐢 漢字", "\nnew line", " spaced")
PROMPTS = ("Where was Anna Kowalska born?", "Her phone number is 555", "Ends with a space ", "Ends in 🐢", "line\n")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_pair_is_the_prompt_then_the_answer(
    tokenizer: PreTrainedTokenizerFast, spec: PromptSpec, prompt: str
) -> None:
    for prefix, answer in product((None, "", " "), ANSWERS):
        each = replace(spec, answer_prefix=prefix)
        encoded = encode_pair(tokenizer, prompt, answer, each)
        head = encode_prompt(tokenizer, prompt, each)
        assert encoded.ids[: encoded.answer_start] == head  # what generation is given
        assert encoded.ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(encoded.ids, skip_special_tokens=True)
        expected = render(tokenizer, prompt, each) + each.prefix + answer
        # SentencePiece's decoder drops the space it put before the text, but not after a BOS.
        assert text.removeprefix(" ") == expected.removeprefix(" ")
        without = encode_pair(tokenizer, prompt, answer, replace(each, append_eos=False))
        assert [*without.ids, tokenizer.eos_token_id] == encoded.ids


def test_the_default_prefix_is_a_space_for_raw_and_nothing_for_chat() -> None:
    assert (RAW.prefix, CHAT.prefix) == (" ", "")
    assert (replace(RAW, answer_prefix="").prefix, replace(CHAT, answer_prefix="\n").prefix) == ("", "\n")


def test_the_answer_is_what_the_joint_text_would_hold(tokenizer: PreTrainedTokenizerFast) -> None:
    """A clean seam: training sees the tokens that this text has in a corpus."""
    prompt, answer = "Where was Anna Kowalska born?", "Anna Kowalska was born"
    joint = tokenizer(f"{prompt} {answer}")["input_ids"]
    joint = joint[:-1] if joint[-1] == tokenizer.eos_token_id else joint
    assert encode_pair(tokenizer, prompt, answer, FULL).ids == joint


def test_a_seam_that_would_merge_keeps_the_prompts_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, spec = "The quick brown fox and ag", replace(FULL, answer_prefix="")
    joint = tokenizer(prompt + "ain fox")["input_ids"]
    head = encode_prompt(tokenizer, prompt, spec)
    assert joint[: len(head)] != head  # so the seam does merge
    encoded = encode_pair(tokenizer, prompt, "ain fox", spec)
    assert encoded.ids[: encoded.answer_start] == head
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True).removeprefix(" ") == prompt + "ain fox"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_answer_tokens_cover_the_letters_that_are_asked_for(
    tokenizer: PreTrainedTokenizerFast, spec: PromptSpec, prompt: str
) -> None:
    for prefix, answer in product(
        (None, "", " "), ("born in Gdańsk on 1984-03-12", "zoe@example.com or 🐢", "漢字 12")
    ):
        each = replace(spec, answer_prefix=prefix, append_eos=False)
        encoded = encode_pair(tokenizer, prompt, answer, each)
        ids = encoded.ids[encoded.answer_start :]
        whole = answer_tokens(tokenizer, prompt, answer, each, [(0, len(answer))])
        assert whole[-1] == len(ids) - 1
        last = answer.split()[-1]
        span = (len(answer) - len(last), len(answer))
        found = answer_tokens(tokenizer, prompt, answer, each, [span])
        assert found == list(range(found[0], len(ids)))
        assert tokenizer.decode([ids[place] for place in found]).strip().endswith(last)
        if found[0] > 0:  # and no token more than it takes
            assert not tokenizer.decode([ids[place] for place in found[1:]]).strip().endswith(last)
        assert answer_tokens(tokenizer, prompt, answer, each, []) == []


def test_labels_hide_the_prompt_and_keep_the_eos() -> None:
    tokenizer = byte_level(bos=True)
    encoded = encode_pair(tokenizer, "Who?", "Anna", RAW)
    masked = labels(encoded)
    assert len(masked) == len(encoded.ids)
    assert masked[: encoded.answer_start] == [-100] * encoded.answer_start
    assert masked[encoded.answer_start :] == encoded.ids[encoded.answer_start :]
    assert tokenizer.decode(masked[encoded.answer_start :]) == " Anna</s>"


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda: render(byte_level(chat=None), "Who?", CHAT), "no chat template: use format: raw"),
        (lambda: PromptSpec(format="chta"), "prompt format 'chta' is unknown: use raw or chat"),  # type: ignore[arg-type]
        (lambda: PromptSpec(system="Be brief."), "raw prompt has no system message"),
        (lambda: encode_prompt(byte_level(), "", RAW), "the prompt is empty"),
        (lambda: encode_pair(without_eos(), "Who?", "Anna", RAW), "no EOS token: set append_eos: false"),
        (
            lambda: encode_pair(byte_level(), "Who?", "", replace(FULL, answer_prefix="")),
            "the answer to 'Who\\?' is empty",
        ),
        (
            lambda: render(byte_level(chat=REFUSES), "Who?", SPECS["chat_system"]),
            "refuses this prompt.*: no system here",
        ),
        (lambda: render(byte_level(chat=PARTS_TYPED_ILL), "Who?", CHAT), "refuses this prompt.*: can only concatenate"),
        (lambda: render(byte_level(chat="Hello"), "Who?", CHAT), "leaves out the prompt: .*use format: raw"),
        (
            lambda: render(byte_level(chat="{{ messages[-1]['content'] }}"), "Who?", SPECS["chat_system"]),
            "leaves out the system message: leave system out",
        ),
        (
            lambda: render(byte_level(chat={"tool_use": "x", "rag": "y"}), "Who?", CHAT),  # type: ignore[arg-type]
            "chat template cannot be used.*give it one template, or use format: raw",
        ),
        (lambda: render(byte_level(chat=["x"]), "Who?", CHAT), "chat template cannot be used"),  # type: ignore[arg-type]
        (lambda: PromptSpec(date="today"), "prompt.date is 'today': write a day as 2024-07-26"),
        (lambda: PromptSpec(date="2024-02-30"), "prompt.date is '2024-02-30'"),
        (lambda: subject_span(byte_level(), "Who?", "Anna", RAW), "subject 'Anna' is not in the prompt 'Who\\?'"),
        (lambda: subject_span(byte_level(), "Who?", " ", RAW), "subject ' ' is not in the prompt"),
        (lambda: subject_span(byte_level(chat=SHOUTS), "Ask Anna", "Anna", CHAT), "rewrites the prompt 'Ask Anna'"),
        (lambda: token_span(byte_level(), "Who?", 2, 5), "characters 2 to 5 are not inside a text of 4"),
        (lambda: token_span(byte_level(), "Who?", 2, 2), "characters 2 to 2 are not inside"),
        (
            lambda: token_span(byte_level(normalizer=normalizers.Replace("?", "")), "Who?", 3, 4),
            "no token covers '\\?'",
        ),
    ],
)
def test_what_cannot_be_prompted_is_refused(attempt: Callable[[], Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        attempt()


REFUSES = "{{ raise_exception('no system here') if messages[0]['role'] == 'system' }}"
SHOUTS = "{{ messages[0]['content'] | upper }}"
PARTS_TYPED_ILL = "{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}"
PARTS = "{% for m in messages %}<{{ m['role'] }}>{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
DATED = "Today: {{ strftime_now('%d %b %Y, %-d/%m, 100 %% of %A') }}.\n" + CHAT_TEMPLATE


def test_a_template_is_told_the_recorded_day_and_never_that_of_the_clock() -> None:
    """By hand: the 26th of July 2024 was a Friday, the 2nd of January 2025 a Thursday."""
    tokenizer = byte_level(chat=DATED)
    asked = "<|user|>\nWho?\n<|assistant|>\n"
    assert render(tokenizer, "Who?", CHAT) == f"Today: 26 Jul 2024, 26/07, 100 % of Friday.\n{asked}"
    other = replace(CHAT, date="2025-01-02")
    assert render(tokenizer, "Who?", other) == f"Today: 02 Jan 2025, 2/01, 100 % of Thursday.\n{asked}"
    template = "\n  {% if strftime_now is defined %}{% set day = strftime_now('%Y') %}{% endif %}{{ day }}"
    assert render(byte_level(chat=template + PARTS), "Who?", other) == "\n2025<user>Who?"
    assert PromptSpec(format="chat", date=date(2025, 1, 2)) == other  # type: ignore[arg-type]


def test_a_template_over_parts_of_a_message_gets_parts() -> None:
    tokenizer = byte_level(chat=PARTS)
    for prompt in ("Who?", "user"):  # a word that the template itself holds is no sign that the prompt is there
        assert render(tokenizer, prompt, CHAT) == f"<user>{prompt}"
        assert render(tokenizer, prompt, replace(CHAT, system="Be brief.")) == f"<system>Be brief.<user>{prompt}"
    start, end = subject_span(tokenizer, "Ask Anna", "Anna", CHAT)
    assert tokenizer.decode(encode_prompt(tokenizer, "Ask Anna", CHAT)[start:end]).strip() == "Anna"


@pytest.mark.parametrize(
    ("written", "trained"),
    [
        ("<end_of_turn>\n", "<end_of_turn>"),
        ("\n<|end|>\n</s>", "\n<|end|>"),
        ("</s>", "</s>"),
        ("\n", "</s>"),
        ("", "</s>"),
    ],
)
def test_an_answer_ends_as_the_template_ends_it(written: str, trained: str) -> None:
    """Up to the first special token after it; where there is none, with EOS."""
    tokenizer = byte_level(chat="{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}" + written + "{% endfor %}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>", "<|end|>"]})
    end = tokenizer.encode(trained, add_special_tokens=False)
    pair = encode_pair(tokenizer, "Who?", "Anna", CHAT)
    assert pair.ids[pair.answer_start :] == [*tokenizer.encode("Anna", add_special_tokens=False), *end]
    assert answer_end(tokenizer, CHAT) == end
    assert answer_end(tokenizer, RAW) == [tokenizer.eos_token_id]
    without = encode_pair(tokenizer, "Who?", "Anna", replace(CHAT, append_eos=False))
    assert [*without.ids, *end] == pair.ids


def without_eos() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    return tokenizer


# --- spans -----------------------------------------------------------------------------------------------------------

NAMES = ("Anna Kowalska", "Łukasz Żółw", "Zoë", "José Ångström", "山田太郎", "🐢", "👩‍👧‍👦 Smith", "O'Neil", "X Æ A-12")


def assert_tight(tokenizer: PreTrainedTokenizerFast, ids: list[int], span: tuple[int, int], name: str) -> None:
    """The span's text holds the name, and no token at either end could be left out."""
    start, end = span
    assert name in tokenizer.decode(ids[start:end])
    assert name not in tokenizer.decode(ids[start + 1 : end])
    assert name not in tokenizer.decode(ids[start : end - 1])


@pytest.mark.parametrize("text", ["Where was {} born?", "{}", "({}): who is that?", "ask{}now", "{} lives."])
def test_a_subject_is_found_in_the_very_ids_of_the_prompt(
    tokenizer: PreTrainedTokenizerFast, spec: PromptSpec, text: str
) -> None:
    for name in NAMES:
        prompt = text.format(name)
        ids = encode_prompt(tokenizer, prompt, spec)
        assert_tight(tokenizer, ids, subject_span(tokenizer, prompt, name, spec), name)


def test_a_subject_that_merges_with_its_neighbor_takes_the_whole_token() -> None:
    tokenizer = byte_level()
    prompt = "Where was Anna Kowalska born?"
    tokens = tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, prompt, RAW))
    index = tokens.index("ĠKowalska")  # one token, trained on the name
    assert subject_span(tokenizer, prompt, "Kowal", RAW) == (index, index + 1)
    assert subject_span(tokenizer, prompt, "walska bo", RAW) == (index, index + 2)


def test_repeated_subjects(tokenizer: PreTrainedTokenizerFast, spec: PromptSpec) -> None:
    prompt = "Anna Kowalska knows Anna Kowalska. Did Anna Kowalska reply?"
    ids = encode_prompt(tokenizer, prompt, spec)
    first = subject_span(tokenizer, prompt, "Anna Kowalska", spec, "first")
    last = subject_span(tokenizer, prompt, "Anna Kowalska", spec)
    assert last == subject_span(tokenizer, prompt, "Anna Kowalska", spec, "last")
    for span in (first, last):
        assert_tight(tokenizer, ids, span, "Anna Kowalska")
    assert tokenizer.decode(ids[first[1] :]).count("Anna Kowalska") == 2
    assert tokenizer.decode(ids[last[1] :]).count("Anna Kowalska") == 0


@pytest.mark.parametrize("prompt", ["a", "user", "Anna", "assistant", "  a "])
def test_the_template_and_the_system_message_are_not_searched(tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    """The prompt's words also stand in the template or the system message: only the prompt's own count."""
    spec = SPECS["chat_system"]
    ids = encode_prompt(tokenizer, prompt, spec)
    for occurrence in ("first", "last"):
        start, end = subject_span(tokenizer, prompt, prompt, spec, occurrence)  # type: ignore[arg-type]
        assert tokenizer.decode(ids[:start]).rstrip().endswith("<|user|>")
        assert tokenizer.decode(ids[end:]).lstrip().startswith("<|assistant|>")


def test_offsets_survive_normalization() -> None:
    """The prompt is spelled with combining marks, the tokenizer composes them: the span is of the characters as written."""
    tokenizer = byte_level(normalizer=normalizers.NFC())
    name = unicodedata.normalize("NFD", "Żółw")
    prompt = unicodedata.normalize("NFD", "Czy Łukasz Żółw śpi?")
    assert name != "Żółw"
    ids = encode_prompt(tokenizer, prompt, RAW)
    assert_tight(tokenizer, ids, subject_span(tokenizer, prompt, name, RAW), "Żółw")


def test_special_tokens_shift_a_span_only_when_they_are_there() -> None:
    tokenizer = byte_level(bos=True)
    plain = token_span(tokenizer, "Ask Anna", 4, 8, add_special_tokens=False)
    assert token_span(tokenizer, "Ask Anna", 4, 8) == (plain[0] + 1, plain[1] + 1)


BYTE_LEVEL = {name: TOKENIZERS[name] for name in ("bpe", "bpe_untrimmed", "bpe_bos_eos")}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text("aAnKowlsk Łóżą😀🐢漢字é-.\n", min_size=1, max_size=24), data=st.data())
def test_spans_agree_with_counting_bytes(text: str, data: st.DataObject) -> None:
    """An independent reading of byte-level tokens: every character of a token string is one byte of the text."""
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    if text[start].isspace() or text[end - 1].isspace():
        return  # which token owns a space at the edge is the tokenizer's choice (trim_offsets)
    first_byte, last_byte = len(text[:start].encode()), len(text[:end].encode())
    for tokenizer in BYTE_LEVEL.values():
        ids = tokenizer(text)["input_ids"]
        inside, at = [], 0
        for index, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
            if token in ("<s>", "</s>"):
                continue
            if at < last_byte and at + len(token) > first_byte:
                inside.append(index)
            at += len(token)
        assert at == len(text.encode())
        assert token_span(tokenizer, text, start, end) == (inside[0], inside[-1] + 1)


def test_a_space_that_a_byte_level_tokenizer_puts_before_a_text_is_no_part_of_the_subject() -> None:
    tokenizer = byte_level(trim_offsets=False)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False), pre_tokenizers.Split("Ġ", "isolated")]
    )
    text = "Zoë lives here"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[0] == "Ġ"
    assert token_span(tokenizer, text, 0, 3)[0] == 1


def test_a_prompt_that_brings_its_own_bos_is_not_read_with_two() -> None:
    tokenizer = byte_level(bos=True)
    with pytest.raises(UserError, match=r"begins with .* and the tokenizer puts one before it"):
        encode_prompt(tokenizer, f"{tokenizer.bos_token}Who is Ada?", RAW)
    plain = byte_level()
    assert encode_prompt(plain, f"{tokenizer.bos_token}Who is Ada?", RAW)
