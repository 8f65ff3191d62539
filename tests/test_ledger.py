"""`durable.ledger`: tokens spent on models' answers, tokens that restoring has saved, and what they cost."""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager

import anthropic
import openai
import pytest
from kernels import kernel

import durable_nb as durable
from durable_nb import _current, _ledger, _usage
from durable_nb._engine import Asked, Engine
from durable_nb._engine.workflows import Workflows
from durable_nb._facts import Status
from durable_nb._store import Store
from durable_nb.testing import FakeClock, MemoryStore, ModelServer, runtime


def answer(model, read, written):
    """As the OpenAI service gives it."""
    return {"model": model, "choices": [], "usage": {"prompt_tokens": read, "completion_tokens": written}}


async def ask(n):
    return answer("small", 10 * n, n)


@pytest.fixture(autouse=True)
def _key(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))


@asynccontextmanager
async def process(path):
    store = Store(path)
    engine = Engine(store)
    before = _current._engines[:]
    _current.use_engine(lambda: workflows)
    workflows = Workflows(engine)
    try:
        yield engine
    finally:
        _current._engines[:] = before
        store.close()


async def cell(engine, body, status=Status.COMPLETED):
    run = await engine.begin(Asked("cell", "k"))
    try:
        return await run.execute(body())
    finally:
        await run.finish(status)


def rows(**options):
    """The frame as a list of dicts, without the runs' ids and times."""
    return [
        {k: v for k, v in row.items() if k not in ("run", "started")} for row in durable.ledger(**options).to_dict("records")
    ]


def counted(model, spent, saved=(0, 0, 0)):
    names = "requests", "input_tokens", "output_tokens"
    return {
        "model": model,
        **dict(zip(names, spent, strict=False)),
        **{f"saved_{n}": v for n, v in zip(names, saved, strict=False)},
    }


def test_what_was_spent_and_what_restoring_has_saved_by_run_and_in_all(tmp_path):
    """A cell is executed three times, in two processes; only what is new is spent."""
    items = [1, 2]

    async def body():
        return await durable.map("ask", ask, items)

    async def main():
        async with process(tmp_path / "store") as engine:
            assert rows() == []
            await cell(engine, body)
            assert rows() == [{"of": "cell", **counted("small", (2, 30, 3))}]
            items.append(3)
            await cell(engine, body)
        async with process(tmp_path / "store") as engine:
            assert rows() == [
                {"of": "cell", **counted("small", (1, 30, 3), (2, 30, 3))},
                {"of": "cell", **counted("small", (2, 30, 3))},
            ]
            await cell(engine, body)
            await cell(engine, body)
            assert rows()[0] == {"of": "cell", **counted("small", (0, 0, 0), (3, 60, 6))}
            assert rows(by="store") == [counted("small", (3, 60, 6), (8, 150, 15))]

    asyncio.run(main())


def test_prices(tmp_path):
    """A dated version has its model's price, the nearest name counts, and what has no price costs nobody knows what."""

    async def main():
        async with process(tmp_path / "store") as engine:
            for model in ("small-2026-11-01", "small-pro", "big"):

                async def body(model=model):
                    return await durable.run("ask", lambda: answer(model, 1_000_000, 100_000))

                await cell(engine, body)
            found = {row["model"]: row for row in rows(by="store", prices={"small": (2, 10), "small-pro": (20.0, 100.0)})}
            assert found["small-2026-11-01"]["cost"] == pytest.approx(3)
            assert found["small-pro"]["cost"] == pytest.approx(30)
            assert math.isnan(found["big"]["cost"])
            assert found["small-pro"]["saved_cost"] == 0
            for wrong in ({"small": 3}, {"small": ("1", 2)}, {"small": (1, -2)}, {"small": (1, 2, 3)}, 7):
                with pytest.raises(ValueError, match="a million input and a million output tokens cost"):
                    durable.ledger(prices=wrong)
            with pytest.raises(ValueError, match="write 'run' or 'store'"):
                durable.ledger(by="day")

    asyncio.run(main())


def test_without_pandas_it_is_a_list_that_reads_as_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(_ledger, "find_spec", lambda _: None)

    async def main():
        async with process(tmp_path / "store") as engine:
            assert repr(durable.ledger()) == "no step has recorded a model's answer"

            async def body():
                return await durable.run("ask", ask, 2)

            await cell(engine, body)
            found = durable.ledger(by="store", prices={"small": (5, 5)})
            assert found == [{**counted("small", (1, 20, 2)), "cost": pytest.approx(11e-5), "saved_cost": 0.0}]
            assert repr(found).splitlines()[1].split() == ["small", "1", "20", "2", "0", "0", "0", "0.0001", "0.0000"]

    asyncio.run(main())


def test_a_workflow_that_died_has_saved_what_its_replay_did_not_ask_again():
    @durable.workflow(name="asks a model")
    async def asks():
        return [await durable.run("ask", ask, n) for n in (1, 2, 3)]

    async def main():
        store, clock = MemoryStore(), FakeClock()
        async with runtime(store, clock=clock, crash="after:step", nth=2):
            await asks.start(id="1")
        async with runtime(store, clock=clock):
            run = durable.get_run("1")
            run.resume()
            await run
            assert rows() == [{"of": "asks a model", **counted("small", (3, 60, 6), (2, 30, 3))}]

            @durable.workflow(name="looks")
            async def looks():
                durable.ledger()

            with pytest.raises(durable.NotSupportedError, match=r"durable\.ledger\(\) can't be used in a workflow's own code"):
                await looks.start(id="2")

    asyncio.run(main())


def test_answers_as_the_packages_and_the_services_give_them():
    """Chat completions, responses, embeddings and messages; streams tell it in their events."""
    text = [{"role": "user", "content": "one two three"}]
    with ModelServer() as server:
        client = openai.OpenAI(base_url=server.openai_url, api_key="any")
        claude = anthropic.Anthropic(base_url=server.url, api_key="any")
        said = client.chat.completions.create(model="a", messages=text)
        assert _usage.of_value(said) == {"a": {"requests": 1, "input_tokens": 3, "output_tokens": 5}}
        assert _usage.of_value((said.choices[0].message.content, said)) == _usage.of_value(said)
        assert _usage.of_value([said.model_dump()] * 2)["a"] == {"requests": 2, "input_tokens": 6, "output_tokens": 10}
        assert _usage.of_value(client.responses.create(model="b", input="one two"))["b"]["input_tokens"] == 2
        assert _usage.of_value(client.embeddings.create(model="c", input="one two"))["c"]["input_tokens"] == 2
        message = claude.messages.create(model="d", max_tokens=9, messages=text)
        assert _usage.of_value(message) == {"d": {"requests": 1, "input_tokens": 3, "output_tokens": 5}}
        asked = {"model": "e", "stream": True, "messages": text, "max_tokens": 9}
        for path, more in (
            ("v1/chat/completions", {"stream_options": {"include_usage": True}}),
            ("v1/messages", {}),
            ("v1/responses", {"input": "one two three"}),
        ):
            streamed = client._client.post(f"{server.url}/{path}", json=asked | more).read()
            assert _usage.of_answer(streamed) == {"e": {"requests": 1, "input_tokens": 3, "output_tokens": 5}}, path
    cached = {"model": "d", "usage": {"input_tokens": 3, "cache_read_input_tokens": 900, "output_tokens": 5}}
    assert _usage.of_value(cached)["d"]["input_tokens"] == 903
    for value in (None, 7, "usage", {"usage": 3}, {"usage": {"input_tokens": "3"}}, [{"usage": None}], _usage, dict, object()):
        assert _usage.of_value(value) == {}
    for content in (b"", b'{"usage": 3}', b'"usage"', b'data: {"usage"}', b'{"usage": {}}', b'\xff"usage"'):
        assert _usage.of_answer(content) == {}


@pytest.mark.kernel
def test_a_cell_that_is_restored_as_a_whole_has_saved_its_answers(tmp_path):
    """In a real kernel: run, restart, a hit in the next one; and one more, that a third kernel is told of."""
    define = (
        "def answer(n):\n    return {'model': 'small', 'usage': {'prompt_tokens': 10 * n, 'completion_tokens': n}}\n"
        "def told(): return durable.ledger(by='store').drop(columns='model').values.tolist()"
    )
    cell = "%%durable asks\nfound = await durable.map('ask', answer, [1, 2])"
    with kernel(tmp_path) as nb:
        nb.run(define)
        assert nb.run(cell).status == "ok"
        assert nb.value("told()") == [[2, 30, 3, 0, 0, 0]]
        nb.restart()
        nb.run(define)
        assert "restored" in nb.run(cell).told[-1]
        assert nb.value("told()") == [[2, 30, 3, 2, 30, 3]]
        nb.restart()
        nb.run(define)
        nb.run(cell)
        assert nb.value("told()") == [[2, 30, 3, 4, 60, 6]]
