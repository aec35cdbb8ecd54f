"""Every command that the docs, the configs and the help texts show is one that the command takes: it is parsed, and not run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lm.config import parse_config
from palimpsest.command import arguments_of
from palimpsest.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
NAMES = {stage.name: stage for stage in STAGES}
COMMAND = re.compile(
    r'^\s*(?:#\s+)?(?:accelerate launch (?:"\$\([^)]*\)"|[^"])*?)?'
    r"(?:(?:-m )?palimpsest|python scripts/|scripts/)"
    r"\s?(?P<stage>[\w-]+)(?:\.py)?\s(?P<words>.*)$"
)


def texts() -> dict[str, str]:
    """Where commands are shown, by name."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    found = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    return found | {f"palimpsest {stage.name} --help": stage.help() for stage in STAGES}


def commands() -> list[tuple[str, str, str]]:
    """(where, stage, words) of every command that is shown whole; `…` stands for what a reader adds."""
    found = []
    for where, text in texts().items():
        for line in re.sub(r"\\\n\s*(?:#\s+)?", " ", text).splitlines():
            for part in (*re.findall(r"`([^`]+)`", line), line):
                match = COMMAND.match(part)
                if match and match["stage"].replace("_", "-") in NAMES and not re.search(r"…|\.\.\.|--help", part):
                    found.append((where, match["stage"].replace("_", "-"), match["words"]))
    return list({command[1:]: command for command in reversed(found)}.values())  # each once, wherever else it is shown


@pytest.mark.parametrize(("where", "name", "words"), commands(), ids=str)
def test_a_command_is_one_that_the_command_takes(
    where: str, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    stage = NAMES[name]
    explained = re.sub(r"\s{2,}[^-\s].*$", "", words.strip())  # a line of help says at its end what it is for
    split = shlex.split(explained, comments=True)
    parse_config(stage.config_class(), arguments_of(stage, split))
