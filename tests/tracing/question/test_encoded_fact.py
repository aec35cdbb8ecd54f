"""The tokens of a fact: their texts, and why a fact is not known."""

from __future__ import annotations

from families import byte_level
from tiny_tracing import known, tiny

from lm.prompts import PromptSpec
from tracing import Fact
from tracing.question.encoded_fact import encode_fact, token_texts, why_unknown


def test_a_letter_that_is_cut_into_bytes_is_shown_whole() -> None:
    tokenizer = byte_level()
    texts = token_texts(tokenizer, tokenizer("a 中🐢b", add_special_tokens=False)["input_ids"])
    assert "".join(text for text in texts if " of " not in text) == "a b"
    assert [text for text in texts if "中" in text] == [f"中 ({place} of 3)" for place in (1, 2, 3)]
    assert [text for text in texts if "🐢" in text] == [f"🐢 ({place} of 4)" for place in (1, 2, 3, 4)]
    broken = [tokenizer.convert_tokens_to_ids("ä"), *tokenizer("z", add_special_tokens=False)["input_ids"]]
    assert token_texts(tokenizer, broken) == ("\ufffd", "z"), "half of a letter has no text"


def test_a_space_at_the_end_of_a_prompt_is_named_where_the_answer_is_missed() -> None:
    model = tiny()
    (fact,) = known(model, how_many=1)
    wrong = f"{fact.answer} {fact.answer}"
    spaced = encode_fact(model, Fact(f"{fact.prompt} ", fact.subject, wrong), PromptSpec(), "probability")
    said = why_unknown(model, spaced)
    assert said is not None
    assert said.endswith("; the prompt ends in a space, and the answer brings its own: leave it out")
    plain = encode_fact(model, Fact(fact.prompt, fact.subject, wrong), PromptSpec(), "probability")
    assert "space" not in str(why_unknown(model, plain))
