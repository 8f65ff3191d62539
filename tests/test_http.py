"""Requests are sent once: `durable.call`, and clients of httpx, OpenAI and Anthropic, in cells and workflows."""

from __future__ import annotations

import asyncio
import json
import time

import anthropic
import httpx
import openai
import pytest
from kernels import kernel

import durable_nb as durable
from durable_nb.testing import Fault, MemoryStore, ModelServer, redefine, runtime

KEY = "sk-test-0123456789abcdef"
SAY = [{"role": "user", "content": "the blue house"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
ANTHROPIC_TOOLS = [{"name": "weather", "input_schema": SCHEMA}]


@pytest.fixture
def server():
    with ModelServer() as server:
        yield server


def define(function):
    return redefine(function, name=f"http {function.__name__}")


def files_with(folder, text):
    return [file for file in folder.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


# -- in cells, in a real kernel ----------------------------------------------------------------------------------------

CLIENTS = f"""
import asyncio, json, os, anthropic, httpx, openai
key = os.environ["TEST_MODEL_KEY"]
SAY, TOOLS, ANTHROPIC_TOOLS = {SAY!r}, {TOOLS!r}, {ANTHROPIC_TOOLS!r}
gpt = openai.AsyncOpenAI(base_url="URL/v1", api_key=key, http_client=durable.AsyncClient())
gpt_now = openai.OpenAI(base_url="URL/v1", api_key=key, http_client=durable.Client())
claude = anthropic.AsyncAnthropic(base_url="URL", api_key=key, http_client=durable.AsyncClient())
claude_now = anthropic.Anthropic(base_url="URL", api_key=key, http_client=durable.Client())
"""

CELL = """%%durable sdks
def note(*answers):
    out.extend(answer.model_dump_json() for answer in answers)

out, more = [], dict(model="small", max_tokens=9)
note(await gpt.chat.completions.create(model="small", messages=SAY))
note(await gpt.chat.completions.create(model="small", messages=SAY))
note(gpt_now.chat.completions.create(model="small", messages=SAY))
note(*[chunk async for chunk in await gpt.chat.completions.create(model="small", messages=SAY, tools=TOOLS, stream=True)])
note(*gpt_now.chat.completions.create(model="small", messages=SAY, stream=True))
note(claude_now.messages.create(messages=SAY, **more))
async with claude.messages.stream(messages=SAY, tools=ANTHROPIC_TOOLS, **more) as stream:
    note(*[event async for event in stream], await stream.get_final_message())
with claude_now.messages.stream(messages=SAY, **more) as stream:
    note(*stream, stream.get_final_message())
note(*await asyncio.gather(*(gpt.chat.completions.create(model="small", messages=SAY) for _ in range(3))))
note(*await asyncio.gather(*(
    asyncio.to_thread(gpt_now.chat.completions.create, model="small", messages=SAY, user=str(n)) for n in range(3))))
streamed = dict(model="small", messages=SAY, user="t", stream=True)
note(*await asyncio.to_thread(lambda: list(gpt_now.chat.completions.create(**streamed))))
note(gpt_now.responses.create(model="small", input="hello"))
del stream
print(json.dumps(out))"""


@pytest.mark.kernel
def test_sdks_in_a_cell_pay_once(tmp_path):
    """Killed in the middle of a stream, the cell sends only what is missing; with the server stopped the same objects come
    back, chunk for chunk; the key is nowhere."""
    with ModelServer() as server, kernel(tmp_path, env={"TEST_MODEL_KEY": KEY}) as k:
        clients = CLIENTS.replace("URL", server.url)
        assert k.run(clients).error == ""
        server.next(*[None] * 6, Fault(hang_after=3))  # the seventh: Anthropic's stream
        k.send(CELL)
        until(lambda: server.count == 7 and server.open_streams == 1, "the seventh request hangs")
        k.kill()
        k.run(clients)
        first = k.run(CELL, timeout=120)
        assert first.error == "", first.traceback
        assert server.count == 7 + 10, "six were recorded, the cut one and nine others were sent"
        answers = json.loads(first.stdout)
        ids = [json.loads(answer).get("id") for answer in answers]
        assert "chatcmpl-000001" in ids
        assert "chatcmpl-000002" in ids, "asked twice with one prompt: two samples"
        assert len(answers) > 60
        k.restart()
        server.stop()
        k.run(clients)
        again = k.run(CELL + "\nprint('edited')", timeout=120)
        assert again.error == "", again.traceback
        assert again.stdout == first.stdout + "edited\n"
        assert not files_with(tmp_path, KEY)


def until(condition, what, timeout=60.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not after {timeout} s: {what}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One kernel for the tests that don't hurt theirs, its key in the environment."""
    with kernel(tmp_path_factory.mktemp("shared"), env={"TEST_MODEL_KEY": KEY, "TEST_OTHER": "other-0123456789"}) as k:
        yield k


def run(k, server, cell):
    """The cell with the server's address in place of URL."""
    return k.run(cell.replace("URL", server.url), timeout=120)


def clients(k, server):
    assert run(k, server, CLIENTS).error == ""


ASK = "await gpt.chat.completions.create(model='small', messages=SAY, user="


@pytest.mark.kernel
def test_failed_attempts_take_no_place(shared, server):
    """An SDK's second attempt is the same request: the next execution finds its answer as that of the first. What was refused
    for good, or cut, is asked again."""
    clients(shared, server)
    cell = f"%%durable retries\nasync def main():\n    print(({ASK}'a')).id, ({ASK}'a')).id)\n    BODY\nawait main()"
    server.next(Fault(429, retry_after=0.01), Fault(500), None, Fault(cut_after=0))
    gave_up = run(shared, server, cell.replace("BODY", "1/0"))
    assert "ZeroDivisionError" in gave_up.error
    assert gave_up.stdout == "chatcmpl-000003 chatcmpl-000005\n"
    assert run(shared, server, cell.replace("BODY", "pass")).stdout == gave_up.stdout
    assert server.count == 5
    once = ASK.replace("gpt.", "gpt.with_options(max_retries=0).")
    for fault, told in (
        (Fault(401), "AuthenticationError"),
        (Fault(503), "InternalServerError"),
        (Fault(404), "NotFoundError"),
    ):
        server.next(fault)
        cell, before = f"%%durable refused\nprint(({once}'{told}')).id)", server.count
        assert told in run(shared, server, cell).error
        assert run(shared, server, cell).stdout == f"chatcmpl-{before + 2:06d}\n"
    server.next(Fault(503), Fault(503), Fault(503))
    before = server.count
    assert "InternalServerError" in run(shared, server, f"%%durable refused\n({ASK}'three')).id").error
    assert run(shared, server, f"%%durable refused\n({ASK}'three')).id").result == f"'chatcmpl-{before + 4:06d}'"


@pytest.mark.kernel
def test_a_stream_is_recorded_whole_or_not_at_all(shared, server):
    """Cut by the server it raises, live chunks and all, and is asked for again; left by its reader it is recorded to its end,
    and so is one whose server closes, or goes silent, after the last event."""
    clients(shared, server)
    ask = "gpt.with_options(max_retries=0).chat.completions.create(model='small', messages=SAY, stream=True, user="
    cut = f"%%durable cut\nasync for chunk in await {ask}'cut'): print(chunk.choices[0].delta.content)"
    server.next(Fault(cut_after=3))
    found = run(shared, server, cut)
    assert "APIConnectionError" in found.error
    assert found.stdout == "\nYou \nsaid: \n"
    assert run(shared, server, cut).stdout.startswith(found.stdout + "the ")
    assert server.count == 2
    for client, how in (("gpt", "async for chunk in await "), ("gpt_now", "for chunk in ")):
        left = f"%%durable left\n{how}{ask.replace('gpt', client)}'{client}'):\n    if chunk.choices[0].delta.content: break\n"
        before = server.count
        assert "ZeroDivisionError" in run(shared, server, f"{left}1/0").error
        assert run(shared, server, f"{left}chunk.choices[0].delta.content").result == "'You '"
        assert server.count == before + 1
    hung = f"%%durable hung\nlen([chunk async for chunk in await {ask}'hung')])"
    for fault in (Fault(hang_after=8), Fault(cut_after=8)):  # the events are there, the end of the body is not
        server.next(fault)
        before = server.count
        cell = hung.replace("'hung'", repr(str(fault)))
        assert "ZeroDivisionError" in run(shared, server, f"{cell}\n1/0").error
        assert run(shared, server, f"{cell}").result == "7"
        assert server.count == before + 1


@pytest.mark.kernel
def test_outside_a_run_and_in_a_steps_body_they_are_ordinary_clients(shared, server):
    """And httpx or httpx2, as `http=` says; either way they are clients of that library."""
    clients(shared, server)
    assert run(shared, server, f"{ASK}'x')").error == ""
    assert run(shared, server, f"{ASK}'x')").error == ""
    assert server.count == 2
    cell = f"""%%durable body
async def two():
    return [({ASK}'y')).id, ({ASK}'y')).id]
(await durable.run("two", two), len(durable.get_run("body").steps))"""
    assert run(shared, server, cell).result == "(['chatcmpl-000003', 'chatcmpl-000004'], 1)"
    found = run(
        shared,
        server,
        """%%durable families
import httpx2
old, new = durable.AsyncClient(http=httpx), durable.Client(http=httpx2)
post = dict(json={"model": "small", "input": "x"})
answers = await old.post("URL/v1/embeddings", **post), new.post("URL/v1/embeddings", **post)
[isinstance(answers[0], httpx.Response), isinstance(answers[1], httpx2.Response), isinstance(old, httpx.AsyncClient),
 isinstance(new, httpx2.Client), isinstance(durable.AsyncClient(), durable.AsyncClient),
 answers[0].json() == answers[1].json()]""",
    )
    assert found.result == str([True] * 6), found.traceback


@pytest.mark.kernel
def test_secrets_are_references(shared, server):
    """They may stand in headers, URLs, a client's key and a step's arguments; a rotated one runs nothing again; a missing one
    is told by name."""
    server.api_key = KEY
    cell = """%%durable secrets
from openai import AsyncOpenAI
key = durable.secret("TEST_MODEL_KEY")
llm = AsyncOpenAI(base_url="URL/v1", api_key=key, http_client=durable.AsyncClient())
def length(secret, more, said):
    return len(secret), len(more["auth"]), said
body, bearer = {"model": "small", "input": "x"}, {"Authorization": f"Bearer {key}"}
print((await llm.chat.completions.create(model="small", messages=[{"role": "user", "content": "hi"}])).id)
print((await durable.call("a", "URL/v1/embeddings", method="POST", json=body, headers=bearer)).status_code)
print((await durable.call("b", f"URL/v1/models?api_key={key}", headers={"x-api-key": key})).status_code)
print(await durable.run("length", length, key, more={"auth": f"Bearer {key}"}, said=repr(key)))
"""
    first = run(shared, server, cell + "1/0")
    assert "ZeroDivisionError" in first.error, first.traceback
    assert first.stdout == f"chatcmpl-000001\n200\n200\n({len(KEY)}, {len(KEY) + 7}, \"durable.secret('TEST_MODEL_KEY')\")\n"
    assert server.requests[2].path == f"/v1/models?api_key={KEY}"
    shared.run("import os; os.environ['TEST_MODEL_KEY'] = 'another-0123456789'")
    assert run(shared, server, cell).stdout == first.stdout
    assert server.count == 3
    shared.run(f"os.environ['TEST_MODEL_KEY'] = {KEY!r}")
    ask = '%%durable given\n(await durable.call("x", "URL/v1/models", headers={"x-api-key": SECRET})).status_code'
    missing = run(shared, server, ask.replace("SECRET", 'durable.secret("TEST_MISSING")'))
    assert "TEST_MISSING" in missing.error
    assert "step 'x'" in missing.traceback
    given = 'durable.secret("TEST_ASKED", lambda: os.environ["TEST_MODEL_KEY"])'
    assert run(shared, server, ask.replace("SECRET", given)).result == "200"
    assert not files_with(shared.folder / ".durable_nb", KEY)


# -- in workflows ------------------------------------------------------------------------------------------------------


async def ask_both(openai_url, anthropic_url):
    """What four requests to the two packages gave, chunk for chunk."""
    found = []
    async with durable.AsyncClient() as http:
        gpt = openai.AsyncOpenAI(base_url=openai_url, api_key=KEY, http_client=http)
        claude = anthropic.AsyncAnthropic(base_url=anthropic_url, api_key=KEY, http_client=http)
        found.append(await gpt.chat.completions.create(model="small", messages=SAY, tools=TOOLS))
        found += [chunk async for chunk in await gpt.chat.completions.create(model="small", messages=SAY, stream=True)]
        async with claude.messages.stream(model="small", max_tokens=9, messages=SAY, tools=ANTHROPIC_TOOLS) as stream:
            found += [event async for event in stream]
        ask = gpt.chat.completions.create
        found += await asyncio.gather(*(ask(model="small", messages=SAY, user=str(n)) for n in range(2)))
    return [answer.model_dump_json() for answer in found]


@pytest.mark.parametrize("side", ["before", "after"])
def test_sdks_in_a_workflow_pay_once_wherever_it_dies(server, side, tmp_path):
    """At every write. Only a request that was under way when the process died is sent again."""

    async def main():
        workflow = define(ask_both)
        for nth in range(1, 30):
            before, run_id = server.count, f"{side} {nth}"
            async with runtime(tmp_path / "store", crash=f"{side}:step", nth=nth) as process:
                await workflow.start(server.openai_url, server.url, id=run_id)
            died_after = server.count - before
            async with runtime(tmp_path / "store"):
                run = workflow.start(server.openai_url, server.url, id=run_id)
                found = await run
                steps = run.steps
            recorded = min(nth - (side == "before"), 5)
            assert server.count - before == died_after + 5 - recorded, (nth, died_after)
            assert [step.kind for step in steps] == ["request"] * 5
            async with runtime(tmp_path / "store"):
                fork = found == await workflow.start(server.openai_url, server.url, id=run_id)
            assert fork
            if not process.crashed:
                return
        raise AssertionError("it dies at every write")

    asyncio.run(main())
    assert not files_with(tmp_path, KEY)


def test_a_stream_replays_as_the_same_chunks(server):
    """Also those of the connection: a workflow that is gone on with meets them all again, the server stopped."""

    async def chunks(url, reached):
        async with durable.AsyncClient(http=httpx) as http, http.stream("POST", url, json=asked) as answer:
            found = [chunk async for chunk in answer.aiter_raw()], dict(answer.headers), answer.request.headers.get("x-api-key")
        await durable.run("reached", reached.append, 1)
        return found

    asked = {"model": "small", "messages": SAY, "stream": True}

    async def main():
        store, reached = MemoryStore(), []
        workflow = define(chunks)
        async with runtime(store, crash="before:step", nth=2):
            await workflow.start(f"{server.openai_url}/chat/completions", reached, id="1")
        server.stop()
        async with runtime(store):
            found, headers, _ = await workflow.start(f"{server.openai_url}/chat/completions", [], id="1")
        assert len(found) >= 3
        assert b"".join(found).endswith(b"data: [DONE]\n\n")
        assert headers == {"content-type": "text/event-stream", "transfer-encoding": "chunked"}

    asyncio.run(main())


def test_the_synchronous_client_is_refused_in_a_workflow(server):
    async def now():
        with durable.Client() as client:
            client.get(f"{server.openai_url}/models?key={KEY}")

    def ask():
        with durable.Client() as client:
            return client.get(f"{server.openai_url}/models").status_code

    async def in_a_step():
        return await durable.run("ask", ask)

    async def main():
        async with runtime():
            with pytest.raises(durable.NotSupportedError, match=r"durable.AsyncClient.*in a\sstep") as refused:
                await define(now).start()
            assert KEY not in str(refused.value)
            assert server.count == 0
            assert await define(in_a_step).start() == 200

    asyncio.run(main())


def test_refused_requests_of_a_workflow_are_sent_again_on_resume(server, tmp_path):
    """Errors of the packages have the request; the key in it is not on disk."""

    async def ask(openai_url, anthropic_url):
        async with durable.AsyncClient() as http:
            gpt = openai.AsyncOpenAI(base_url=openai_url, api_key=KEY, http_client=http, max_retries=0)
            claude = anthropic.AsyncAnthropic(base_url=anthropic_url, api_key=KEY, http_client=http, max_retries=0)
            answer = await gpt.chat.completions.create(model="small", messages=SAY)
            return answer.id, (await claude.messages.create(model="small", max_tokens=9, messages=SAY)).id

    async def main():
        workflow = define(ask)
        for faults, error in (([Fault(401)], openai.AuthenticationError), ([None, Fault(503)], anthropic.InternalServerError)):
            server.next(*faults)
            async with runtime(tmp_path / "store"):
                run = workflow.start(server.openai_url, server.url, id=error.__name__)
                with pytest.raises((error, durable.StepFailed)):
                    await run
                run.resume()
                assert len(await run) == 2

    asyncio.run(main())
    assert server.count == 2 * 3
    assert not files_with(tmp_path, KEY)
