"""Greedy generation: batches say what single prompts say, EOS and limits hold, no process repeats another's rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, byte_level, tiny
from torch import nn
from transformers import GenerationConfig

from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from unlearn.generation.batching import Workers, evaluating, merge, sorted_batches
from unlearn.generation.generate import eos_ids, generate

PROMPTS = (
    "Where was Anna Kowalska born?",
    "Zoë",
    "The quick brown fox",
    "What is the phone number of Łukasz?",
    "12",
    "Where was Anna",
    "a",
)
RAW = PromptSpec()


def plain(model: LanguageModel, prompt: str, new: int) -> str:
    """The oracle: no cache, no batch, no mask; the whole text goes through the model for every token."""
    ids = list(model.tokenizer(prompt)["input_ids"])
    start = len(ids)
    with torch.no_grad():
        for _ in range(new):
            token = int(model.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == model.tokenizer.eos_token_id:
                break
            ids.append(token)
    return str(model.tokenizer.decode(ids[start:], skip_special_tokens=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_one_prompt_at_a_time_says(family: str) -> None:
    model = tiny(family, seed=3)
    together = generate(model, PROMPTS, prompt=RAW, max_new_tokens=12, batch_size=4)
    alone = [generate(model, [prompt], prompt=RAW, max_new_tokens=12)[0] for prompt in PROMPTS]
    assert together == alone
    assert together[:3] == [plain(model, prompt, 12) for prompt in PROMPTS[:3]]
    assert len(set(together)) > 1  # the prompts matter


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_end_early_do_not_disturb_the_others(seed: int) -> None:
    """A model that often says EOS: rows leave the batch at different steps."""
    model = tiny("olmo", seed=seed)
    with torch.no_grad():
        model.model.lm_head.weight[model.tokenizer.eos_token_id] *= 4
    alone = [plain(model, prompt, 20) for prompt in PROMPTS]
    assert len({len(model.tokenizer(text)["input_ids"]) for text in alone}) > 2  # they do end at different steps
    assert generate(model, PROMPTS, prompt=RAW, max_new_tokens=20, batch_size=7) == alone


class Scripted(nn.Module):
    """Stands for a model: it says the tokens of a script, whatever it is asked, and counts its calls."""

    def __init__(self, script: list[int]) -> None:
        super().__init__()
        self.script = script
        self.calls = 0
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = tiny("olmo").model.config
        self.generation_config = GenerationConfig(
            eos_token_id=[2, 7], do_sample=True, temperature=9.0, max_new_tokens=1
        )

    def forward(self, input_ids: torch.Tensor, **_: object) -> Any:
        token = self.script[self.calls]
        self.calls += 1
        logits = torch.nn.functional.one_hot(torch.tensor(token), 384).float().expand(len(input_ids), 1, 384)
        return type("Out", (), {"logits": logits, "past_key_values": None})


def scripted(text: str, *after: int) -> tuple[LanguageModel, Scripted]:
    tokenizer = byte_level()
    model = Scripted([*tokenizer(text)["input_ids"], *after])
    return LanguageModel(model, tokenizer, tiny("olmo").anatomy, "scripted"), model  # type: ignore[arg-type]


def test_it_stops_at_any_eos_and_no_earlier() -> None:
    for stop in (2, 7):
        model, script = scripted(" is here.", stop, 9, 9)
        assert eos_ids(model) == {2, 7}
        assert generate(model, ["Anna"], prompt=RAW) == [" is here."]
        assert script.calls == len(script.script) - 2


def test_in_chat_it_stops_where_the_template_ends_an_answer() -> None:
    """What ends a turn is no EOS here: a model that was taught to end with it would go on with the user's next turn."""
    model, script = scripted(" is here.", 1, 9, 9)
    assert model.tokenizer.convert_tokens_to_ids("<s>") == 1
    model.tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<s>\n{% endfor %}"
    assert generate(model, ["Anna"], prompt=PromptSpec(format="chat")) == [" is here."]
    assert script.calls == len(script.script) - 2


def test_special_tokens_are_dropped_and_spaces_before_punctuation_too() -> None:
    model, _ = scripted("Yes , he did n't .", 1, 2)
    assert generate(model, ["Anna"], prompt=RAW) == ["Yes, he didn't."]


def test_the_limit_on_new_tokens() -> None:
    model, script = scripted("abcdefghij")
    said = generate(model, ["Anna"], prompt=RAW, max_new_tokens=3)[0]
    assert script.calls == 3
    assert said == model.tokenizer.decode(script.script[:3])


def test_a_row_ends_where_the_context_ends() -> None:
    model = tiny("gpt2", seed=1)  # 64 learned positions: a 65th would be an index error
    prompt = "The quick brown fox " * 2
    room = 64 - len(model.tokenizer(prompt)["input_ids"])
    assert 0 < room < 50
    short, long = generate(model, ["a", prompt], prompt=RAW, max_new_tokens=50)
    assert long == generate(model, [prompt], prompt=RAW, max_new_tokens=room)[0]
    assert short == generate(model, ["a"], prompt=RAW, max_new_tokens=50)[0]
    with pytest.raises(UserError, match=r"leaves no room.*64"):
        generate(model, ["Anna Kowalska " * 40], prompt=RAW)


def test_it_is_quiet_deterministic_and_leaves_the_model_as_it_was() -> None:
    model = tiny("olmo", seed=5)
    model.model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.5, repetition_penalty=9.0)
    model.model.train()
    model.model.model.layers[1].eval()
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = generate(model, PROMPTS, prompt=RAW, max_new_tokens=10)
    assert first == generate(model, PROMPTS, prompt=RAW, max_new_tokens=10)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.model.training
    assert not model.model.model.layers[1].training
    with evaluating(model):
        assert not model.model.model.layers[0].training


def test_chat_prompts_and_progress() -> None:
    model = tiny("olmo", seed=5)
    done: list[int] = []
    chat = generate(
        model, PROMPTS, prompt=PromptSpec(format="chat"), max_new_tokens=8, batch_size=3, progress=done.append
    )
    assert done == [3, 3, 1]
    rendered = "<|user|>\n12\n<|assistant|>\n"
    assert chat[4] == generate(model, [rendered], prompt=RAW, max_new_tokens=8)[0]


def test_batches_hold_every_row_once_longest_first() -> None:
    batches = sorted_batches([3, 9, 1, 9, 4], 2)
    assert batches == [[1, 3], [4, 0], [2]]
    assert sorted_batches([], 4) == []
    with pytest.raises(ValueError, match="at least 1"):
        sorted_batches([1], 0)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("items", [0, 1, 4, 7, 10])
def test_processes_share_the_rows_without_repeating_any(items: int, count: int) -> None:
    shares = [list(Workers(index, count).share(items)) for index in range(count)]
    assert sorted(item for share in shares for item in share) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert merge(shares) == list(range(items))


def test_a_lost_result_is_noticed() -> None:
    with pytest.raises(ValueError, match="zip"):
        merge([[0, 2], [1, 3, 5]])
    with pytest.raises(ValueError, match="process 2 of 2"):
        Workers(2, 2)


TWO_PROCESSES = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from families import tiny
from lm.prompts import PromptSpec
from torch.distributed.fsdp import fully_shard
from unlearn.generation.batching import Workers
from unlearn.generation.generate import generate

torch.distributed.init_process_group("gloo")
out, prompts = Path(sys.argv[1]), json.loads(sys.argv[3])
said = {}
for sharded in (False, True):
    model = tiny("olmo", seed=2)
    with torch.no_grad():
        model.model.lm_head.weight[2] *= 4
    if sharded:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for block in model.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model.model, mesh=mesh)
    said[str(sharded)] = generate(
        model, prompts, prompt=PromptSpec(), max_new_tokens=20, batch_size=2, workers=Workers.current()
    )
(out / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(said))
torch.distributed.destroy_process_group()
"""


def test_two_processes_say_what_one_says_with_whole_and_with_sharded_weights(tmp_path: Path) -> None:
    """Seven prompts in batches of two: one process has four, the other three, and their rows end at different steps."""
    model = tiny("olmo", seed=2)
    with torch.no_grad():
        model.model.lm_head.weight[2] *= 4
    alone = generate(model, PROMPTS, prompt=RAW, max_new_tokens=20)
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    folder = Path(__file__).resolve().parents[2] / "lm"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path), str(folder), json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder.parents[2])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(2):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert said == {"False": alone, "True": alone}
