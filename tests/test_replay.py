"""A replay goes the way the run went: generated programs with deaths, edits and failures, and the shapes that broke it once."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from typing import Any

import pytest
from programs import EDITS, Life, World, edited, generate, unique

import durable_nb as durable
from durable_nb import _current
from durable_nb.testing import FakeClock, MemoryStore, outcomes, redefine, runtime

PROGRAMS = int(os.environ.get("DURABLE_NB_PROGRAMS", "120"))
"""How many programs each of the fuzzers executes."""
SEED = int(os.environ.get("DURABLE_NB_SEED", "0")) * 1_000_000


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    before = dict(_current.workflow_functions)
    yield
    _current.workflow_functions.clear()
    _current.workflow_functions.update(before)


class Trial:
    """One run of one program, over all its lives."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.program = generate(self.rng)
        self.world, self.store, self.clock = World(seed), MemoryStore(), FakeClock()
        self.life = Life(self.world)

    async def live(self, *, nth: int | None = None, resume: bool = False) -> tuple[str, Any]:
        """One process: how the run ended in it, or 'died'. `nth`: it dies at that write."""
        before = self.acknowledged()
        self.life = Life(self.world)
        executed = len(self.world.done)
        program, life = self.program, self.life

        async def body():
            await life.go(program)

        order = redefine(body, name="order")
        side = self.rng.choice(["before", "after"])
        end: tuple[str, Any] = "died", None
        crash = {"crash": f"{side}:write", "nth": nth} if nth else {}
        async with runtime(self.store, clock=self.clock, **crash) as process:
            run = durable.get_run("42").resume() if resume else order.start(id="42")
            try:
                await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(_outcome(run))), 20)
                end = "returned", None
            except TimeoutError:
                return "stuck", None
            except Exception as error:
                end = type(error).__name__, error
        again = {(name, arg) for name, arg, _ in self.world.done[executed:] if not isinstance(arg, list)} & before
        self.others = [(asked, got) for *asked, got in self.life.wrong]
        self.again = again
        return ("died", None) if process.crashed else end

    def acknowledged(self) -> set[tuple[str, Any]]:
        """Steps asked for once at most that are on record."""
        recorded = {outcome.name for outcome in outcomes(self.store) if not outcome.failed}
        return {step for step in unique(self.program) if step[0] in recorded and _is_only_one(self.program, step[0])}


async def _outcome(run: Any) -> Any:
    return await run


def _is_only_one(program: Any, name: str) -> bool:
    return str(program).count(f"'step', '{name}'") == 1


def _prefix(one: list[Any], other: list[Any]) -> bool:
    n = min(len(one), len(other))
    return one[:n] == other[:n]


def test_generated_programs_killed_again_and_again_go_the_way_they_went():
    """No answer is given to another request, nothing recorded runs again, no false NonDeterminismError, and what was told comes
    again in the same order."""

    async def one(seed: int) -> None:
        trial = Trial(seed)
        told: list[Any] = []
        for _ in range(trial.rng.randrange(1, 5)):
            end, error = await trial.live(nth=trial.rng.randrange(1, 14))
            assert end in ("died", "returned", "RuntimeError", "ExceptionGroup", "CancelledError"), (end, error)
            assert not trial.others, f"answers to somebody else's question: {trial.others}"
            assert _prefix(told, trial.life.trace), (told, trial.life.trace)
            assert not trial.again, f"recorded, and executed again: {trial.again}"
            told = max(told, trial.life.trace, key=len)
            if end != "died":
                return
        end, error = await trial.live()
        assert end in ("returned", "RuntimeError", "ExceptionGroup"), (end, error)
        assert not trial.others, f"answers to somebody else's question: {trial.others}"
        assert not trial.life.trace or trial.life.trace[: len(told)] == told  # it was over, or goes the same way
        assert not trial.again, f"recorded, and executed again: {trial.again}"

    _each(one, 0)


def test_generated_edits_are_told_before_anything_runs_or_give_no_wrong_answer(caplog):
    """Eight kinds of edits of a killed run's program. Either the run goes on, and every request gets its own answer; or it is
    told, and then nothing was executed, and with the code put back the run goes on."""

    async def one(seed: int) -> None:
        trial = Trial(seed)
        end, _ = await trial.live(nth=trial.rng.randrange(2, 25))
        if end != "died":
            return
        original, how = trial.program, trial.rng.choice(EDITS)
        changed = edited(original, trial.rng, how)
        if changed is None:
            return
        trial.program, before = changed, len(trial.world.done)
        end, error = await trial.live()
        if end != "NonDeterminismError":
            assert end in ("returned", "RuntimeError", "ExceptionGroup", "CancelledError"), (how, end, error)
            # A computed argument may be another one now: the recorded result stands, and is told. Never another step's.
            assert all(asked[0] == got[0] for asked, got in trial.others), trial.others
            assert not trial.others or any("recorded result stands" in message for message in caplog.messages)
            return
        assert trial.world.done[before:] == [], (how, "executed before it was told")
        assert "recorded" in str(error)
        trial.program = original
        end, error = await trial.live(resume=True)
        assert end in ("returned", "RuntimeError", "ExceptionGroup", "CancelledError"), (how, end, error)

    _each(one, 1)


def test_generated_failed_runs_come_to_their_end_when_the_world_is_set_right():
    """resume() keeps what was recorded, tries the failure again, and makes progress whatever the code did after it; also when
    it is killed in the middle."""

    async def one(seed: int) -> None:
        trial = Trial(seed)
        end, error = await trial.live()
        if end not in ("RuntimeError", "ExceptionGroup"):
            return
        trial.world.is_mended = True
        end, error = await trial.live(nth=trial.rng.randrange(1, 9) if seed % 2 else None, resume=True)
        if end == "died":
            end, error = await trial.live(resume=True)
        assert end == "returned", (end, error)
        assert not trial.others, f"answers to somebody else's question: {trial.others}"
        assert trial.again <= _compensations(trial), f"recorded, and executed again: {trial.again}"

    _each(one, 2)


def _compensations(trial: Trial) -> set[Any]:
    """Steps that may follow a failure: what it has caused is forgotten."""
    return unique(trial.program)


def _each(one: Any, salt: int) -> None:
    for n in range(PROGRAMS):
        seed = SEED + 100_000 * salt + n
        try:
            asyncio.run(one(seed))
        except BaseException as error:
            error.add_note(f"program {seed}")
            raise
        if not n % 50:
            gc.collect()
