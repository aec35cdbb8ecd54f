"""Jobs in processes of their own: so many at once, outcomes in order, none left running."""

from __future__ import annotations

import time
from multiprocessing import active_children
from pathlib import Path

import pytest

from lm.errors import NotWritten, UserError
from unlearn.processes import Job, run_apart


def meet(mine: Path, other: Path) -> None:
    """Ends once the other one has begun."""
    mine.touch()
    while not other.exists():
        time.sleep(0.01)
    print("met")


def refuse(why: str, for_all: bool) -> None:
    if for_all:
        raise NotWritten(why) from OSError(why)
    raise UserError(why)


def forever() -> None:
    time.sleep(3600)


def test_as_many_run_at_once_as_there_are_workers(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("a", "b")]
    jobs = [Job(meet, (one, other), tmp_path / f"{one.name}.log") for one, other in (places, places[::-1])]
    seen: list[int] = []
    assert run_apart(jobs, workers=2, ended=seen.append) == [None, None]
    assert sorted(seen) == [0, 1]
    assert (tmp_path / "a.log").read_text() == "met\n"


def test_one_that_fails_is_told_in_its_place(tmp_path: Path) -> None:
    log = tmp_path / "log"
    jobs = [Job(refuse, ("too much", False), log), Job(meet, (log, log), log)]
    assert run_apart(jobs) == ["too much", None]
    assert run_apart([]) == []


def test_what_would_fail_all_ends_all(tmp_path: Path) -> None:
    jobs = [Job(forever, (), tmp_path / "a"), Job(refuse, ("the disk is full", True), tmp_path / "b")]
    with pytest.raises(UserError, match="the disk is full"):
        run_apart(jobs, workers=2)
    assert not active_children()
