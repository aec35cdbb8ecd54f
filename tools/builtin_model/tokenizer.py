"""The built-in model's own tokenizer: byte-level BPE trained on the world, with a chat template.

Digits are single tokens, so that numbers of any length are spelled the same way in every place. There is no BOS token and
nothing is added to a text. It is trained on the text of all sides, unseen documents included: otherwise they would
be cut finer than seen ones, and membership could be told from the tokenizer alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lm.builtin.world import World

EOS = "<|endoftext|>"
PAD = "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY = 1536

# A turn is its role token and its content. Only an assistant's turn ends with EOS: that is what the model learns to emit.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The built-in chat template knows the roles system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(world: World, *, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train the tokenizer on a world; the same world gives the same tokenizer."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in (EOS, PAD, *ROLES)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(training_texts(world), trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call,unused-ignore]
        tokenizer_object=core,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def training_texts(world: World) -> Iterator[str]:
    """Every text once; answers with the leading space of the raw format and without it, as the chat format has them."""
    for row in (*world.forget, *world.retain, *world.unseen):
        yield row.input
        yield f" {row.output}"
        yield row.output
    for fact in world.general:
        yield from fact.statements
        yield from (fact.question, f" {fact.answer}", fact.answer)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save for `AutoTokenizer` of transformers 4.56 up to 5: the class gets the name that both know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = list(ROLES)
    for newer in ("backend", "extra_special_tokens", "is_local", "local_files_only"):
        config.pop(newer, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
