"""`durable.chat`: a model's answer is paid for once."""

from __future__ import annotations

import asyncio
import pickle
from contextlib import asynccontextmanager

import httpx
import pytest

import durable_nb as durable
from durable_nb import _current
from durable_nb._engine import Asked, Engine
from durable_nb._engine.observing import Notice
from durable_nb._engine.workflows import Workflows
from durable_nb._facts import Status
from durable_nb._store import Store
from durable_nb.testing import FakeClock, Fault, MemoryStore, ModelServer, runtime

KEY = "sk-test-0123456789abcdef"
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two three"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}]


class Notices:
    def __init__(self):
        self.told = []

    def __call__(self, observation):
        if isinstance(observation, Notice):
            self.told.append(observation.text)


@pytest.fixture
def server():
    with ModelServer(api_key=KEY) as server:
        yield server


@pytest.fixture(autouse=True)
def _environment(tmp_path, monkeypatch, server):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.openai_url}/")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)


@asynccontextmanager
async def process(path):
    store = Store(path)
    engine = Engine(store, clock=FakeClock(), jitter=lambda: 0.0)
    workflows, before = Workflows(engine), _current._engines[:]
    _current.use_engine(lambda: workflows)
    try:
        yield engine
    finally:
        _current._engines[:] = before
        store.close()


async def asked(engine, name="ask", **options):
    """What one execution of a cell gets that asks this, or the error it ends with."""

    async def body():
        return await durable.chat(name, **{"model": "small", "messages": HELLO, **options})

    run = await engine.begin(Asked("cell", "k"))
    notices = Notices()
    run.observers.subscribe(notices)
    status = Status.FAILED
    try:
        value = await run.execute(body())
        status = Status.COMPLETED
        return value
    except Exception as error:
        return error
    finally:
        await run.finish(status)


def in_a_cell(path, *rounds):
    """What each of these gets, one cell after the other."""

    async def main():
        async with process(path) as engine:
            return [await asked(engine, **options) for options in rounds]

    return asyncio.run(main())


def test_an_answer_is_paid_for_once(tmp_path, server, monkeypatch):
    """The second process asks nothing, though the server is gone and the key is not set; another model, message or option is
    another request; another key is not."""  # fmt: skip
    first, again, hotter, other_key = in_a_cell(
        tmp_path / "store", {}, {}, {"temperature": 1}, {"api_key": durable.secret("OTHER_KEY", lambda: KEY)}
    )
    assert first.text == "You said: one two three"
    assert first.message == {"role": "assistant", "content": first.text}
    assert first.usage == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    assert first.raw["model"] == "small"
    assert pickle.loads(pickle.dumps(first)) == first == again == other_key
    assert hotter != first
    assert [request.json.get("temperature") for request in server.requests] == [None, 1]
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert len(server.requests[0].headers["idempotency-key"]) == 32
    server.stop()
    monkeypatch.delenv("OPENAI_API_KEY")
    assert in_a_cell(tmp_path / "store", {}) == [first]
    with_key = [file for file in tmp_path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
    assert with_key == []


def test_tools_parts_and_the_ledger(tmp_path, server):
    async def main():
        async with process(tmp_path / "store") as engine:
            found = await asked(engine, tools=TOOLS)
            assert (found.text, found.message["tool_calls"][0]["function"]["name"]) == ("", "weather")
            said = {"role": "user", "content": [{"type": "text", "text": "one two"}]}
            assert (await asked(engine, messages=[*HELLO, found.message, said])).text == "You said: one two"
            return durable.ledger(by="store").to_dict("records")

    (row,) = asyncio.run(main())
    assert (row["model"], row["requests"]) == ("small", 2)
    assert row["output_tokens"] > 0


def test_anthropics_messages(tmp_path, server, monkeypatch):
    """The system message goes where Anthropic wants it, and the answer is told in the same way."""
    options = {"api": "anthropic", "base_url": server.url, "api_key": KEY, "max_tokens": 9}
    first, again = in_a_cell(tmp_path / "store", options, options)
    assert first == again
    assert first.text == "You said: one two three"
    assert first.message == {"role": "assistant", "content": [{"type": "text", "text": first.text}]}
    assert first.usage == {"input_tokens": 3, "output_tokens": 5}
    assert server.count == 1
    sent = server.requests[0]
    assert (sent.json["system"], sent.json["max_tokens"], sent.headers["x-api-key"]) == ("Be brief.", 9, KEY)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
    (error,) = in_a_cell(tmp_path / "store", {"api": "anthropic"})
    assert "the secret 'ANTHROPIC_API_KEY' is missing" in str(error)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def one_line(error, *parts):
    text = str(error)
    assert "\n" not in text
    assert KEY not in text + repr(error) + repr(pickle.loads(pickle.dumps(error)).__dict__)
    for part in parts:
        assert part in text, text
    return True


def test_a_wrong_key_is_told_and_asked_again_when_it_is_mended(tmp_path, server, monkeypatch):
    wrong, mended = in_a_cell(tmp_path / "store", {"api_key": "sk-wrong"}, {})
    assert isinstance(wrong, httpx.HTTPStatusError)
    assert wrong.response.status_code == 401
    assert one_line(
        wrong, "step 'ask'", "/v1/chat/completions answered 401", "invalid api key", "Set OPENAI_API_KEY, or give api_key="
    )
    assert mended.text == "You said: one two three"
    assert server.count == 2
    server.next(Fault(401, body=f'{{"error": {{"message": "Incorrect key: {KEY}"}}}}'.encode()))
    (echoed,) = in_a_cell(tmp_path / "store", {"temperature": 0.5})
    assert one_line(echoed, "Incorrect key")


def test_a_missing_key_is_told_and_nothing_is_sent(tmp_path, server, monkeypatch):
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("OPENAI_API_KEY")
        else:
            monkeypatch.setenv("OPENAI_API_KEY", value)
        (error,) = in_a_cell(tmp_path / "store", {})
        assert one_line(error, "the secret 'OPENAI_API_KEY' is missing", "export OPENAI_API_KEY=...")
    assert server.count == 0
    server.api_key = None
    (found,) = in_a_cell(tmp_path / "store", {"api_key": ""})
    assert found.text == "You said: one two three"
    assert "authorization" not in server.requests[0].headers


NO_ANSWERS = {
    "no JSON": (b"<html>\n<body>Bad gateway", "is not JSON, it begins with '<html> <body>Bad gateway'"),
    "half of it": (b'{"choices": [{"mess', "is not JSON"),
    "nothing": (b"", "is empty"),
    "another thing": (b'{"error": "no credits"}', 'holds no model\'s message, it begins with \'{"error": "no credits"}\''),
    "a list": (b"[1, 2]", "holds no model's message"),
    "no choices": (b'{"choices": []}', "holds no model's message"),
}


@pytest.mark.parametrize(("body", "told"), NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_what_is_no_answer_is_tried_again_told_and_never_recorded(tmp_path, server, body, told):
    server.next(*[Fault(200, body=body)] * 5)
    first, second = in_a_cell(tmp_path / "store", {}, {})
    assert isinstance(first, httpx.DecodingError)
    assert one_line(first, f"step 'ask', POST {server.openai_url}/chat/completions: the answer {told}", "OpenAI's interface?")
    assert second.text == "You said: one two three"
    assert server.count == 6


def test_in_a_workflow_a_refused_question_is_asked_again_on_resume(tmp_path, server, monkeypatch):
    @durable.workflow(name="chats")
    async def chats():
        first = await durable.chat("first", model="small", messages=HELLO)
        second = await durable.chat("second", model="small", messages=[*HELLO, first.message])
        return first.text, second.text

    async def main():
        store, clock = MemoryStore(), FakeClock()
        async with runtime(store, clock=clock):
            server.next(None, Fault(401))
            run = chats.start(id="1")
            with pytest.raises(httpx.HTTPStatusError, match="step 'second'"):
                await run
            run.resume()
            assert (await run)[1].startswith("You said: You said")
        assert server.count == 3
        server.stop()
        async with runtime(store, clock=clock):
            assert (await durable.get_run("1"))[0] == "You said: one two three"

    asyncio.run(main())


NONSENSE = [
    ({"model": ""}, ValueError, "give the model's name, such as 'gpt-5-mini'"),
    ({"model": None}, ValueError, "give the model's name"),
    ({"messages": "hello"}, TypeError, "messages is a str; give a list of dicts"),
    ({"messages": []}, TypeError, "messages is an empty list; give a list of dicts"),
    ({"messages": HELLO[0]}, TypeError, "messages is a dict; give a list"),
    ({"messages": ["hello"]}, TypeError, r"messages\[0\] is a str without a 'role'"),
    ({"messages": [{"content": "hello"}]}, TypeError, r"messages\[0\] is a dict without a 'role'"),
    ({"messages": [{"role": "user", "content": {1}}]}, ValueError, "not JSON serializable; nothing was sent"),
    ({"stream": True}, ValueError, "chat gives the whole answer; nothing was sent"),
    ({"api": "bard"}, ValueError, "write 'openai' or 'anthropic'"),
    ({"api_key": 7}, TypeError, "api_key is a int; give a text"),
    ({"base_url": "localhost:8000"}, ValueError, "needs http:// or https:// and a host"),
    ({"timeout": "soon"}, ValueError, "'soon' is not a duration"),
    ({"name": ""}, ValueError, "the step's name is empty"),
]


@pytest.mark.parametrize(("given", "error", "message"), NONSENSE, ids=[str(row[0])[:30] for row in NONSENSE])
def test_nonsense_is_refused_before_anything_is_sent(tmp_path, server, given, error, message):
    (raised,) = in_a_cell(tmp_path / "store", given)
    assert type(raised) is error
    assert one_line(raised)
    with pytest.raises(error, match=message):
        raise raised
    assert server.count == 0
