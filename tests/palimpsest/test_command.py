"""The command: what it answers without a stage, how it finds a stage and its config, how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest

from palimpsest import command
from palimpsest.command import main
from palimpsest.shipped import CONFIGS, all_shipped, purpose
from palimpsest.stages import STAGES, Stage
from tests.forked import run_forked

ROOT = Path(__file__).resolve().parents[2]

CONFIG = '''
from dataclasses import dataclass
from lm.errors import UserError

HELP = """Brew something.

palimpsest brew --config strong
    palimpsest brew cup-1 cup-2     an example, as it stands
"""

@dataclass(frozen=True, kw_only=True)
class BrewConfig:
    """A brew."""

    minutes: int = 3
    """How long."""
    cups: tuple[str, ...] = ()
    """Which."""
    sugar: str = "none"
    """How sweet."""

    def __post_init__(self) -> None:
        if self.minutes < 1:
            raise UserError(f"minutes is {self.minutes}: give at least 1")
'''
STAGE = """
def run_brew(config):
    if config.sugar == "stop":
        raise KeyboardInterrupt
    return config.minutes * 2

def describe(config, result):
    return f"brewed {list(config.cups)} for {config.minutes}: {result}, sugar {config.sugar}"
"""


@pytest.fixture
def brew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stage of the pattern that every stage has, with configs of its own; the working folder is empty."""
    name = f"brewing_{tmp_path.name}".replace("-", "_")  # no other test's module
    room = tmp_path / "packages" / name
    room.mkdir(parents=True)
    for file, text in (("__init__", ""), ("config", CONFIG), ("stage", STAGE)):
        (room / f"{file}.py").write_text(text)
    configs = tmp_path / "configs"
    (configs / "brew").mkdir(parents=True)
    (configs / "brew" / "strong.yaml").write_text("# Strong tea. It takes\n# its time.\nminutes: 9\n")
    (configs / "brew" / "weak.yaml").write_text("# Weak tea\nminutes: 1\n")
    stage = Stage(
        name="brew", line="", room=name, config="BrewConfig", function="run_brew", folder="brew", operands="cups"
    )
    monkeypatch.syspath_prepend(room.parent)
    monkeypatch.setattr(command, "STAGES", (*STAGES, stage))
    monkeypatch.setattr("palimpsest.shipped.CONFIGS", configs)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    return empty


def run(*words: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue().strip(), err.getvalue().strip()


# --- without a stage


@pytest.mark.parametrize("words", [["--help"], ["configs"], ["--version"], ["configs", "demo"], ["trce"]])
def test_what_needs_no_stage_imports_no_package(words: list[str]) -> None:
    heavy = ("torch", "transformers", "jsonargparse", "lm", "tracing", "sae", "unlearn")
    code = (
        "import sys\nfrom palimpsest.command import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_lists_the_stages_in_the_order_of_the_work() -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert run() == (0, out, "")
    lines = [line.split() for line in out.partition("stages, in the order of the work:\n")[2].splitlines()]
    assert [words[0] for words in lines[: len(STAGES)]] == [stage.name for stage in STAGES]
    order = [out.index(f"\n  {name} ") for name in ("trace", "unlearn", "evaluate", "attack", "report")]
    assert order == sorted(order)


def test_configs_lists_every_shipped_one_with_what_it_is_for() -> None:
    status, out, _ = run("configs")
    assert status == 0
    listed = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    files = {path.relative_to(ROOT / "configs").with_suffix("") for path in (ROOT / "configs").rglob("*.yaml")}
    assert set(listed) == {file.as_posix() for file in files}
    assert all(listed.values())
    assert "of OLMo" not in purpose("unlearn/builtin")
    assert purpose("trace/builtin") == "The built-in model on the built-in world."


def test_a_named_config_gives_its_path_and_a_wrong_one_the_nearest() -> None:
    status, out, _ = run("configs", "accelerate/cpu2_ddp")
    assert (status, Path(out)) == (0, CONFIGS / "accelerate" / "cpu2_ddp.yaml")
    status, _, err = run("configs", "unlearn/bultin")
    assert status == 2
    assert "did you mean 'unlearn/builtin'?" in err


def test_an_unknown_stage_is_refused_with_the_nearest() -> None:
    assert run("unlern") == (
        2,
        "",
        "error: there is no stage 'unlern' (did you mean 'unlearn'?): palimpsest --help lists them",
    )


# --- a stage


def test_a_stage_is_run_with_the_shipped_config_of_a_name(brew: Path) -> None:
    assert run("brew") == (0, "brewed [] for 3: 6, sugar none", "")
    assert run("brew", "--config", "strong") == (0, "brewed [] for 9: 18, sugar none", "")
    assert run("brew", "--config=strong", "--sugar=lots")[1] == "brewed [] for 9: 18, sugar lots"
    assert run("brew", "--config", "strong", "--minutes", "2")[1] == "brewed [] for 2: 4, sugar none"


def test_a_file_is_read_where_it_is(brew: Path) -> None:
    (brew / "mine.yaml").write_text("minutes: 5\n")
    (brew / "plain").write_text("minutes: 6\n")
    assert "for 5" in run("brew", "--config", "mine.yaml")[1]
    assert "for 5" in run("brew", "--config", str(brew / "mine.yaml"))[1]
    assert "for 6" in run("brew", "--config", "plain")[1]
    status, _, err = run("brew", "--config", "not/there.yaml")
    assert status == 2
    assert "not/there.yaml" in err


def test_words_without_a_setting_go_where_the_stage_takes_them(brew: Path) -> None:
    assert "['a', 'b c']" in run("brew", "a", "b c", "--minutes", "4")[1]
    assert run("brew", "--minutes", "4", "a", "--sugar", "b", "b c")[1] == "brewed ['a', 'b c'] for 4: 8, sugar b"


def test_a_stage_may_have_a_config_of_its_own_by_default(brew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *others, stage = command.STAGES
    monkeypatch.setattr(command, "STAGES", (*others, dataclasses.replace(stage, default="weak")))
    assert "for 1: 2" in run("brew")[1]
    assert "for 9: 18" in run("brew", "--config", "strong")[1]
    assert "for 7: 14" in run("brew", "--minutes", "7")[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config", "storng"], "error: palimpsest brew has no shipped config 'storng' (did you mean 'strong'?)"),
        (["--minuts", "4"], "did you mean 'minutes'"),
        (["--minutes", "0"], "error: minutes is 0: give at least 1"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(brew: Path, words: list[str], says: str) -> None:
    status, out, err = run("brew", *words)
    assert (status, out) == (2, "")
    assert says in err
    assert "\n" not in err


def test_a_stage_without_operands_refuses_a_bare_word(brew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *others, stage = command.STAGES
    monkeypatch.setattr(command, "STAGES", (*others, dataclasses.replace(stage, operands=None)))
    status, _, err = run("brew", "cup")
    assert status == 2
    assert err == "error: unrecognized arguments: cup: write settings as --name value"


def test_a_stop_by_hand_ends_with_status_130(brew: Path) -> None:
    status, _, err = run("brew", "--sugar", "stop")
    assert status == 130
    assert err == "stopped: finished work is kept; the same command goes on"  # it has no setting `resume`


def test_only_the_main_process_prints(brew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("brew") == (0, "", "")


def test_help_shows_examples_as_they_stand_and_the_shipped_configs(brew: Path) -> None:
    status, out, _ = run("brew", "--help")
    assert status == 0
    assert "usage: palimpsest brew RUN..." in out
    assert "palimpsest brew --config strong\n    palimpsest brew cup-1 cup-2     an example, as it stands\n" in out
    assert "shipped configs: strong, weak" in out
    assert "How long. (type: int, default: 3)" in out


# --- the registry


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_follows_the_pattern(stage: Stage) -> None:
    assert dataclasses.is_dataclass(stage.config_class())
    assert f"palimpsest {stage.name}" in stage.help()
    assert callable(stage.run())
    assert callable(stage.describe())
    if stage.operands:
        assert stage.operands in {field.name for field in dataclasses.fields(stage.config_class())}


def test_every_stage_has_its_script_and_every_config_its_stage() -> None:
    scripts = {path.stem.replace("_", "-") for path in (ROOT / "scripts").glob("*.py")}
    assert scripts | {"compare"} == {stage.name for stage in STAGES}  # which reads run folders and needs no launcher
    folders = {name.rpartition("/")[0] for name in all_shipped()} - {"accelerate"}
    assert folders <= {stage.folder for stage in STAGES}


@pytest.mark.parametrize("launch", [None, "cpu2_ddp"])
def test_the_module_runs_a_stage_on_one_and_on_two_processes(tiny: Path, tmp_path: Path, launch: str | None) -> None:
    words = ["unlearn", "--config", "builtin", "--model.path", str(tiny / "model"), "--model.device", "cpu"]
    words += ["--forget", str(tiny / "forget.jsonl"), "--retain", str(tiny / "retain.jsonl"), "--scope.layers", "[1]"]
    words += ["--validation.forget", "null", "--validation.retain", "null", "--trainer.evaluate_every", "null"]
    words += ["--trainer.steps", "2", "--trainer.checkpoint", "last", "--out", str(tmp_path / "run")]
    done = run_forked(ROOT / "palimpsest" / "__main__.py", *words, launch=launch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
