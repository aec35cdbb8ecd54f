"""Jobs in processes of their own: so many at once, outcomes in order, none left running."""

from __future__ import annotations

import time
from multiprocessing import active_children
from pathlib import Path

import pytest

from lm.errors import NotWritten, UserError
from unlearn.processes import NOT_BEGUN, Job, run_apart


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
    assert run_apart(jobs, workers=2, ended=lambda place, _: seen.append(place)) == [None, None]
    assert sorted(seen) == [0, 1]
    assert (tmp_path / "a.log").read_text() == "met\n"


def test_one_that_fails_is_told_in_its_place(tmp_path: Path) -> None:
    log = tmp_path / "log"
    jobs = [Job(refuse, ("too much", False), log), Job(meet, (log, log), log)]
    assert run_apart(jobs) == ["too much", None]
    assert run_apart([]) == []


def test_a_job_waits_for_those_before_it_and_lets_others_go_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    one, other = tmp_path / "one", tmp_path / "other"
    jobs = [
        Job(meet, (one, other), log),  # ends once the last has begun
        Job(refuse, ("never begun", False), log, after=(2,)),
    ]
    with pytest.raises(ValueError, match="does not stand before it"):
        run_apart(jobs)
    jobs = [Job(meet, (one, other), log), Job(meet, (log, one), log, after=(0,)), Job(meet, (other, one), log)]
    order: list[str] = []
    outcomes = run_apart(
        jobs,
        workers=2,
        began=lambda place: order.append(f"{place} begins"),
        ended=lambda place, _: order.append(f"{place} ends"),
    )
    assert outcomes == [None, None, None]
    assert order[:2] == ["0 begins", "2 begins"]
    assert order.index("0 ends") < order.index("1 begins")


def test_what_comes_after_one_that_failed_is_not_begun(tmp_path: Path) -> None:
    log = tmp_path / "log"
    jobs = [
        Job(refuse, ("too much", False), log),
        Job(forever, (), log, after=(0,)),
        Job(forever, (), log, after=(1,)),
        Job(meet, (log, log), log),
    ]
    ended: list[tuple[int, str | None]] = []
    outcomes = run_apart(jobs, workers=2, ended=lambda *told: ended.append(told))
    assert outcomes == ["too much", NOT_BEGUN, NOT_BEGUN, None]
    assert dict(ended) == dict(enumerate(outcomes))


def test_an_interrupt_ends_all(tmp_path: Path) -> None:
    def interrupt(place: int) -> None:
        if place == 1:
            raise KeyboardInterrupt

    jobs = [Job(forever, (), tmp_path / name) for name in ("a", "b")]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_apart(jobs, workers=2, began=interrupt)
    assert not active_children()
    assert time.monotonic() - began < 60, "nobody waits for them"


def test_what_would_fail_all_ends_all(tmp_path: Path) -> None:
    jobs = [Job(forever, (), tmp_path / "a"), Job(refuse, ("the disk is full", True), tmp_path / "b")]
    with pytest.raises(UserError, match="the disk is full"):
        run_apart(jobs, workers=2)
    assert not active_children()
