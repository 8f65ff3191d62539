"""Requests are sent once: `durable.call`, and clients of httpx, OpenAI and Anthropic, in cells and workflows."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import importlib
import importlib.util
import json
import logging
import os
import pickle
import random
import re
import subprocess
import sys
import time

import anthropic
import httpx
import nbformat
import openai
import pytest
from kernels import kernel
from nbclient import NotebookClient

import durable_nb as durable
from durable_nb import _exchange
from durable_nb.testing import FakeClock, Fault, MemoryStore, ModelServer, redefine, runtime

KEY = "sk-test-0123456789abcdef"
SAY = [{"role": "user", "content": "the blue house"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
ANTHROPIC_TOOLS = [{"name": "weather", "input_schema": SCHEMA}]


LIBRARIES = [httpx, *([importlib.import_module("httpx2")] if importlib.util.find_spec("httpx2") else [])]
"""Today's openai and anthropic packages bring httpx2, older ones need httpx."""


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
    assert re.match("APIConnectionError|RemoteProtocolError", found.error)  # the older packages leave httpx's as it is
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


SAYING = {
    "the async client": "%%durable saying\nasync for chunk in await gpt.chat.completions.create(ASKED): pass",
    "the synchronous one": "%%durable saying_now\nfor chunk in gpt_now.chat.completions.create(ASKED): pass",
    "Anthropic's": """%%durable claude_saying
async with claude.messages.stream(model="small", max_tokens=9, messages=SAY) as stream:
    async for event in stream: pass""",
    "a workflow": """
@durable.workflow
async def saying(url):
    async with durable.AsyncClient() as http:
        llm = openai.AsyncOpenAI(base_url=url, api_key=key, http_client=http)
        return [chunk async for chunk in await llm.chat.completions.create(ASKED)]
run = saying.start("URL/v1")
run""",
}


@pytest.mark.kernel
@pytest.mark.parametrize("case", SAYING)
def test_the_view_shows_what_a_stream_has_said_so_far(shared, server, case):
    """Beside the step's name, before it has ended."""
    clients(shared, server)
    server.next(Fault(hang_after=7 if "Anthropic" in case else 4))
    asked = "model='small', messages=SAY, stream=True"
    cell = shared.send(SAYING[case].replace("ASKED", asked).replace("URL", server.url))
    rows, until_s = [], time.monotonic() + 60
    while not any(row.get("note", "").startswith("You said:") for row in rows):
        assert time.monotonic() < until_s, rows
        content = shared.client.get_iopub_msg(timeout=60)["content"]
        state = content.get("data", {}).get("state", {}).get("state") if "comm_id" in content else None
        rows = state.get("rows", rows) if state else rows
    assert [row["status"] for row in rows] == ["running"]
    if case == "a workflow":
        shared.run("run.cancel()")
    else:
        shared.manager.interrupt_kernel()
        shared.wait(cell)


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
new = __import__("NEW")
ours = durable.AsyncClient(http=httpx), durable.Client(http=new)
post = dict(json={"model": "small", "input": "x"})
answers = await ours[0].post("URL/v1/embeddings", **post), ours[1].post("URL/v1/embeddings", **post)
[isinstance(answers[0], httpx.Response), isinstance(answers[1], new.Response), isinstance(ours[0], httpx.AsyncClient),
 isinstance(ours[1], new.Client), isinstance(durable.AsyncClient(), durable.AsyncClient),
 answers[0].json() == answers[1].json()]""".replace("NEW", LIBRARIES[-1].__name__),
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


# -- durable.call ------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def answering(*answers):
    """A server that gives these bytes, the last one again and again; its URL and what it was sent."""
    seen = []

    async def serve(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            first = await reader.readexactly(1)
            if first == b"\x16":  # a TLS handshake
                writer.write(b"no TLS here")
                return writer.close()
            head = first + await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            seen.append(head + (await reader.readexactly(int(length[1])) if length else b""))
            answer = answers[min(len(seen), len(answers)) - 1]
            if answer is None:
                await reader.read()  # until the client goes away
            writer.write(answer or b"")
            await writer.drain()
        return writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen


def ok(body, *headers, status=b"200 OK"):
    lines = b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def called(*args, clock=None, read=lambda answer: answer, store=None, **kwargs):
    """What `durable.call("rates", ...)` gives in a workflow, read by `read` in it."""

    async def rates():
        return read(await durable.call("rates", *args, **kwargs))

    async def main():
        async with runtime(store or MemoryStore(), clock=clock):
            return await redefine(rates).start(id="1")

    return main()


BAD = {
    "an unknown host": ("http://nowhere.invalid/x?token=TOKEN", {}, None, httpx.ConnectError),
    "a refused connection": ("http://127.0.0.1:1/x?token=TOKEN", {}, None, httpx.ConnectError),
    "no TLS": ("TLS/x?token=TOKEN", {}, ok(b""), httpx.ConnectError),
    "a body that is too short": ("BASE/x?token=TOKEN", {}, ok(b"12345").replace(b": 5", b": 9"), httpx.RemoteProtocolError),
    "no HTTP": ("BASE/x?token=TOKEN", {}, b"garbage\r\n\r\n", httpx.RemoteProtocolError),
    "no gzip": ("BASE/x?token=TOKEN", {}, ok(b"no gzip", b"Content-Encoding: gzip"), httpx.DecodingError),
    "no JSON": ("BASE/x?token=TOKEN", {"read": lambda answer: answer.json()}, ok(b"<html>"), json.JSONDecodeError),
    "no answer": ("BASE/x?token=TOKEN", {"timeout": 0.05}, None, httpx.ReadTimeout),
    "a body that is read once": ("BASE/x?token=TOKEN", {"method": "POST", "content": iter([b"a"])}, ok(b""), TypeError),
    "no JSON to send": ("BASE/x?token=TOKEN", {"method": "POST", "json": {1, 2}}, ok(b""), ValueError),
    "two lines in a header": ("BASE/x?token=TOKEN", {"headers": {"Authorization": f"Bearer {KEY}\nx"}}, ok(b""), ValueError),
    "letters that headers don't have": ("BASE/x?token=TOKEN", {"headers": {"x-api-key": f"{KEY}\u2026"}}, ok(b""), ValueError),
    "no method": ("BASE/x?token=TOKEN", {"method": "GET IT"}, ok(b""), ValueError),
    "no time-out": ("BASE/x?token=TOKEN", {"timeout": "soon"}, ok(b""), ValueError),
    "no number of retries": ("BASE/x?token=TOKEN", {"retries": -1}, ok(b""), ValueError),
    "another scheme": ("ftp://me:PASSWORD@x/x?token=TOKEN", {}, ok(b""), ValueError),
    "a secret that is not set": (
        "BASE/x?token=TOKEN",
        {"headers": {"x-api-key": durable.secret("TEST_NOT_SET")}},
        ok(b""),
        durable.NonRetryableError,
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_goes_wrong_is_told_with_step_and_url_and_without_secrets(case, caplog):
    url, options, answer, error = BAD[case]
    hidden = "hunter2hunter2"

    async def main():
        async with answering(answer) as (base, _):
            there = url.replace("TLS", base.replace("http", "https")).replace("BASE", base)
            there = there.replace("TOKEN", hidden).replace("PASSWORD", hidden)
            with pytest.raises(error) as raised:
                await called(there, **{"retries": 0, **options})
            return f"{raised.value} {getattr(raised.value, '__notes__', '')}"

    caplog.set_level(logging.DEBUG)
    said = asyncio.run(main())
    assert "rates" in said
    assert "/x" in said
    assert "[redacted]" in said
    for secret in (hidden, KEY):
        assert secret not in said
        assert secret not in caplog.text


def test_a_body_of_any_kind_comes_back_byte_for_byte(tmp_path):
    """Binary, text in any encoding, compressed, large; live and restored alike, headers, time and all."""
    large = random.Random(1).randbytes(3 << 20)
    bodies = {
        "binary": ok(bytes(range(256)), b"Content-Type: image/png"),
        "latin": ok("né".encode("latin-1"), b"Content-Type: text/plain; charset=latin-1"),
        "json": ok('{"a": "ü\\u0000"}'.encode(), b"Content-Type: application/json", b"Link: <a>; rel=next", b"Link: <b>"),
        "gzip": ok(gzip.compress(b"abc" * 1000), b"Content-Encoding: gzip"),
        "chunked": b"HTTP/1.1 200 Fine\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
        "empty": b"HTTP/1.1 204 No Content\r\n\r\n",
        "large": ok(large),
    }

    def read(answer):
        got = answer.content, answer.text[:9], answer.headers.multi_items(), answer.elapsed, answer.reason_phrase
        return *got, answer.status_code, answer.is_success, answer.request.method, answer.is_closed, answer.encoding

    async def main():
        for name, answer in bodies.items():
            async with answering(answer) as (url, seen):
                plain = None

                async def rates(url=url):
                    found = read(await durable.call("rates", url))
                    await durable.run("done", str, 1)
                    return found

                async with httpx.AsyncClient() as client:
                    plain = read(await client.get(url))
                store = tmp_path / name
                async with runtime(store, crash="before:step", nth=2):
                    await redefine(rates).start(id="1")
                async with runtime(store):
                    live = await redefine(rates).start(id="2")
                    again = await redefine(rates).start(id="1")
                for found in (live, again):
                    assert found[:3] + found[4:] == plain[:3] + plain[4:], name
                assert len(seen) == 3, name

    asyncio.run(main())
    assert not files_with(tmp_path / "large" / "journal", large[:2000].hex())
    assert any(file.stat().st_size >= len(large) for file in (tmp_path / "large").rglob("*") if "cache.db" not in file.name)


def test_what_a_request_sends(tmp_path):
    """The idempotency key stays over attempts and is not sent with GET; Retry-After is waited for; nothing of it is on disk."""

    async def main():
        async with answering(ok(b"", b"Retry-After: 7", status=b"503 No"), ok(b"{}")) as (url, seen):
            clock = FakeClock()
            began = clock.wall_s
            options = {"method": "POST", "json": {"a": 1}, "headers": {"Authorization": f"Bearer {KEY}"}, "params": {"q": "x"}}
            at = {"clock": clock, "store": tmp_path / "store"}
            answer = await called(url, **at, **options, read=lambda a: (a.status_code, a.request.headers["authorization"]))
            assert answer == (200, "[redacted]")
            assert clock.wall_s - began == 7
            keys = [re.search(rb"(?i)idempotency-key: (\w+)", request)[1] for request in seen]
            assert len(seen) == 2
            assert keys[0] == keys[1]
            assert f"Authorization: Bearer {KEY}".encode() in seen[1]
            assert seen[1].startswith(b"POST /?q=x HTTP/1.1")
            assert seen[1].endswith(b'{"a":1}')
            await called(url, headers={"X-A": "b"})
            await called(url, method="PUT", content=b"\x00", headers={"Idempotency-Key": "mine"})
            await called(url, method="POST", data={"a": ["1", "2"]})
            assert b"dempotency" not in seen[2]
            assert b"mine" in seen[3]
            assert seen[3].endswith(b"\r\n\r\n\x00")
            assert seen[4].endswith(b"a=1&a=2")

    asyncio.run(main())
    assert not files_with(tmp_path, KEY)


def test_credentials_that_an_answer_repeats_are_not_recorded(tmp_path):
    """An echo service, the link to the next page, an error that quotes the key: the code sees them, live and restored."""
    echo = f'{{"you said": "Bearer {KEY}", "again": "{KEY}"}}'.encode()
    link = f"Link: <http://x/?page=2&api_key={KEY}>".encode()

    async def main():
        for status in (b"200 OK", b"401 Unauthorized"):
            async with answering(ok(echo, link, status=status)) as (url, seen):

                async def rates(url=url):
                    answer = await durable.call("rates", f"{url}/?api_key={KEY}", headers={"Authorization": f"Bearer {KEY}"})
                    client = durable.AsyncClient(headers={"x-api-key": KEY})
                    second = await client.get(url)
                    await client.aclose()
                    await durable.run("done", str, 1)
                    for found in (answer, second):
                        assert found.content == echo
                        assert found.headers["link"].encode() in link
                    return len(answer.content)

                store = tmp_path / status.decode()
                async with runtime(store, crash="before:step", nth=3):
                    await redefine(rates).start(id="1")
                async with runtime(store):
                    assert await redefine(rates).start(id="1") == len(echo)
                assert len(seen) == 2

    asyncio.run(main())
    assert not files_with(tmp_path, KEY)


def test_a_redirect_to_an_address_with_credentials_is_followed_live_and_restored(tmp_path, caplog):
    """As storage services sign them: the next request sends them, wherever the run dies, and the record holds none of them."""
    caplog.set_level(logging.DEBUG)
    there = f"/file?X-Amz-Signature={KEY}&part=1".encode()
    cookie = b"Set-Cookie: session=swordfish-0123456789; Path=/"

    async def fetch(url):
        async with durable.AsyncClient(http=httpx, follow_redirects=True) as http:
            answer = await http.get(url)
        again = await durable.call("again", url)
        await durable.run("done", str, 1)
        return answer.text, answer.history[0].status_code, KEY in again.headers["location"]

    async def main():
        moved = ok(b"", b"Location: " + there, cookie, status=b"302 Found")
        for nth in range(1, 6):
            async with answering(moved, ok(b"whole"), moved, ok(b"")) as (url, seen):
                store = tmp_path / str(nth)
                async with runtime(store, crash="after:step", nth=nth):
                    await define(fetch).start(url, id="1")
                async with runtime(store):
                    assert await define(fetch).start(url, id="1") == ("whole", 302, True)
                assert [request.split(b" ")[1] for request in seen] == [b"/", there, b"/"]

    asyncio.run(main())
    assert "receive_response_headers" in caplog.text
    for secret in (KEY, "swordfish"):
        assert not files_with(tmp_path, secret)
        assert secret not in caplog.text


def test_secrets_by_name_are_nowhere_wherever_they_stand(tmp_path, monkeypatch, caplog):
    """In a path, a query, part of a header, a body: repeated by the answer, or in an error with all that it holds."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TEST_MODEL_KEY", KEY)
    key = durable.secret("TEST_MODEL_KEY")

    async def ask(url):
        found = []
        async with durable.AsyncClient(http=httpx) as http:
            post = {"json": {"password": f"{key}"}, "headers": {"x-auth": f"key={key}; v=1"}}
            for answer in (
                await http.post(f"{url}/bot{key}/send?q={key}", **post),
                await durable.call("rates", f"{url}/bot{key}/send?q={key}", method="POST", **post),
            ):
                assert answer.text.count(KEY) == 4
                found.append(f"{answer.request.url} {answer.request.headers} {answer.url}")
            for failing in (http.get(f"http://127.0.0.1:1/{key}"), durable.call("x", f"http://127.0.0.1:1/{key}", retries=0)):
                with pytest.raises(httpx.ConnectError) as refused:
                    await failing
                found.append(f"{refused.value} {vars(refused.value)} {refused.value.request.url}")
        return found

    async def echo(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head.lower())[1]))
                writer.write(ok(head.split(b"\r\n")[0] + re.search(rb"(?i)x-auth[^\r]+", head)[0] + body))
        writer.close()

    async def main():
        async with await asyncio.start_server(echo, "127.0.0.1", 0) as server, runtime(tmp_path / "store"):
            found = await define(ask).start(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            server.close()
        assert KEY not in str(found)

    asyncio.run(main())
    assert KEY not in caplog.text
    assert not files_with(tmp_path, KEY)


def test_what_an_event_hook_raises_says_no_secret(server):
    async def refuse(response):
        response.raise_for_status()

    async def ask(url):
        async with durable.AsyncClient(http=httpx, event_hooks={"response": [refuse]}, headers={"x-api-key": KEY}) as http:
            await http.get(f"{url}/nothing?api_key={KEY}")

    async def main():
        async with runtime():
            with pytest.raises((httpx.HTTPStatusError, durable.StepFailed), match="404") as refused:
                await define(ask).start(server.url)
            assert "api_key=[redacted]" in str(refused.value)
            assert KEY not in f"{refused.value} {vars(refused.value)}"

    asyncio.run(main())


def described(request, vary=()):
    request.read()
    return _exchange.described(request, vary)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.__name__)
def test_what_a_request_is_identified_by(library):
    """Method, URL, body, Accept, Content-Type, `anthropic-*`, and what `vary` names; no header that differs by attempt or
    version, no white space in JSON, no random boundary, no credential; for both libraries alike."""

    def post(url="http://x/y", **options):
        return described(library.Request("POST", url, **{"json": {"a": 1}, **options}))

    files = {"files": {"f": ("a.txt", b"--text--")}, "json": None, "data": {"n": "1"}}
    same = [
        (post(headers={"x-stainless-retry-count": "0"}), post(headers={"x-stainless-retry-count": "1", "user-agent": "z"})),
        (post(headers={"authorization": "a"}), post(headers={"authorization": "b", "x-api-key": "c"})),
        (post(), post(json=None, content=b'{ "a" : 1 }', headers={"content-type": "application/json"})),
        (post(**files), post(**files)),
        (post("http://me:a@x/y"), post("http://me:b@x/y")),
        (post(f"http://x/y?key={durable.secret('A')}"), post(f"http://x/y?key={durable.secret('B')}")),
        (post(), described(httpx.Request("POST", "http://x/y", json={"a": 1}))),
    ]
    for one, other in same:
        assert one == other
    others = [
        post("http://x/z"),
        post(json={"a": 2}),
        post(json={"a": 1.0}),
        post(headers={"accept": "text/plain"}),
        post(headers={"anthropic-beta": "b"}),
        post(headers={"content-type": "application/json; charset=utf-8"}),
        post("http://x/y?pageToken=a"),
        post("http://x/y?pageToken=b"),
        post(**files),
        post(**(files | {"data": {"n": "2"}})),
        post(**(files | {"files": {"f": ("a.txt", b"other")}})),
        described(library.Request("PUT", "http://x/y", json={"a": 1})),
        described(library.Request("POST", "http://x/y", json={"a": 1}, headers={"x-org": "1"}), ["X-Org"]),
    ]
    for one in others:
        assert [one == other for other in [post(), *others]].count(True) == 1
    assert KEY not in str(post(f"http://x/y?token={KEY}"))


def test_a_request_can_be_sent_by_another_process(server, tmp_path, monkeypatch):
    """Its function and arguments are data; of credentials only references go along, and a header that is none is named."""
    server.api_key = KEY
    monkeypatch.setenv("TEST_MODEL_KEY", KEY)

    def pickled(headers, url=f"{server.openai_url}/models"):
        request = httpx.Request("GET", url, headers=headers)
        sent, credentials = _exchange.as_data(request)
        return pickle.dumps((_exchange.exchange, sent, credentials, _exchange.Line()))

    code = """if True:
        import asyncio, pickle, sys
        send, *arguments = pickle.loads(sys.stdin.buffer.read())
        print(asyncio.run(send(*arguments))["status"])"""
    data = pickled({"Authorization": f"Bearer {durable.secret('TEST_MODEL_KEY')}"})
    assert KEY.encode() not in data
    environment = {**os.environ, "DURABLE_NB_KEY_FILE": str(tmp_path / "another user's.key")}
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, env=environment, check=False)
    assert done.stdout == b"200\n", done.stderr
    for headers, url, told in (
        ({"Authorization": f"Bearer {KEY}"}, f"{server.openai_url}/models", "'Authorization'"),
        ({"X-Api-Key": KEY}, f"{server.openai_url}/models", "'X-Api-Key'"),
        ({}, f"{server.openai_url}/models?api_key={KEY}", "URL"),
    ):
        data = pickled(headers, url)
        assert KEY.encode() not in data
        with pytest.raises(durable.NonRetryableError, match=f"{told}.*stays? in the process.*durable.secret"):
            pickle.loads(data)


def test_the_calls_of_a_run_share_their_connections(server):
    """One after the other they need one; any number may be under way at once; the end of the run closes them."""

    async def many():
        for n in range(5):
            await durable.call(f"one {n}", f"{server.openai_url}/models")
        one = len(server.connections)
        answers = await asyncio.gather(*(durable.call(f"{n}", f"{server.openai_url}/models", timeout=60) for n in range(150)))
        return one, [answer.status_code for answer in answers] == [200] * 150

    async def main():
        async with runtime():
            assert await define(many).start() == (1, True)
            await asyncio.to_thread(until, lambda: not server.connections, "all connections are closed")

    asyncio.run(main())


@pytest.mark.kernel
def test_stop_reaches_code_that_waits_for_the_synchronous_client(shared, server):
    clients(shared, server)
    server.next(Fault(hang_after=0))
    cell = shared.send(f"%%durable stopped\n{ASK.replace('gpt', 'gpt_now').removeprefix('await ')}'stopped')")
    until(lambda: server.count == 1, "it waits for the answer")
    shared.manager.interrupt_kernel()
    assert shared.wait(cell, timeout=20).error.startswith("KeyboardInterrupt")


def test_what_a_body_raises_says_no_secret(tmp_path, monkeypatch, caplog):
    """Of those that it was given by reference, in a text, a list or a dict; async or not, retried or not."""
    monkeypatch.setenv("TEST_MODEL_KEY", KEY)

    def ask(key, headers):
        assert headers["auth"] == f"Bearer {key}"
        assert key.startswith("sk-test-0")
        try:
            raise RuntimeError(f"refused {key}")
        except RuntimeError as error:
            raise ConnectionError(f"with {headers['auth']}") from error

    async def ask_async(key, headers):
        ask(key, headers)

    async def body(fn, retries):
        key = durable.secret("TEST_MODEL_KEY")
        return await durable.run("ask", durable.step(fn, retries=retries), key, headers={"auth": f"Bearer {key}"})

    async def main():
        async with runtime(tmp_path / "store"):
            for retries, fn in enumerate((ask, ask_async)):
                with pytest.raises(ConnectionError, match=re.escape("with Bearer [redacted]")):
                    await define(body).start(fn, retries)

    asyncio.run(main())
    assert KEY not in caplog.text
    assert not files_with(tmp_path, KEY)


def test_an_sdk_that_tries_again_in_a_workflow_wherever_it_dies(server, tmp_path):
    """Its pauses are durable, and an attempt whose failure is recorded is not made again. They are attempts of one request."""

    async def ask(url):
        async with durable.AsyncClient() as http:
            gpt = openai.AsyncOpenAI(base_url=url, api_key=KEY, http_client=http, max_retries=3)
            return (await gpt.chat.completions.create(model="small", messages=SAY)).choices[0].message.content

    async def main():
        clock = FakeClock()
        for nth in range(1, 30):
            before = server.count
            server.next(Fault(429, retry_after=20), Fault(500), Fault(cut_after=0), None, None)
            async with runtime(tmp_path / "store", clock=clock, crash="after:write", nth=nth) as process:
                await define(ask).start(server.openai_url, id=f"{nth}")
            async with runtime(tmp_path / "store", clock=clock):
                run = define(ask).start(server.openai_url, id=f"{nth}")
                assert await run == "You said: the blue house"
                assert [(step.kind, step.status, step.attempts) for step in run.steps] == [("request", "completed", 4)]
            assert 4 <= server.count - before <= 5
            server.faults.clear()
            if not process.crashed:
                assert server.count - before == 4
                return
        raise AssertionError("it dies at every write")

    asyncio.run(main())


def test_a_service_that_refused_every_attempt_is_asked_again_on_resume(server):
    """With as many attempts as at first; what others have done since the first one failed stands."""
    done = []

    def note(n):
        done.append(n)

    async def ask(url):
        async def chain():
            for n in range(3):
                await durable.run(f"beside {n}", note, n)

        async with durable.AsyncClient() as http:
            gpt = openai.AsyncOpenAI(base_url=url, api_key=KEY, http_client=http, max_retries=2)
            answer, _ = await asyncio.gather(gpt.chat.completions.create(model="small", messages=SAY), chain())
            return answer.choices[0].message.content

    async def main():
        async with runtime(clock=FakeClock()):
            server.next(*[Fault(503)] * 3)
            run = define(ask).start(server.openai_url, id="1")
            with pytest.raises((openai.InternalServerError, durable.StepFailed)):
                await run
            assert server.count == 3
            assert [(step.status, step.attempts) for step in run.steps[:1]] == [("failed", 3)]
            server.next(*[Fault(503)] * 2)
            run.resume()
            assert await run == "You said: the blue house"
            assert server.count == 6
            assert run.steps[0].attempts == 3
        assert done == [0, 1, 2]

    asyncio.run(main())


def bound(function, *given):
    """A workflow that calls it with these live objects, in every process of a test."""

    async def ask():
        return await function(*given)

    return redefine(ask)


def numbered(faulty):
    """A transport that numbers its answers: with a status of 503 where `faulty(number)`."""
    count = 0

    def answer(request):
        nonlocal count
        count += 1
        return httpx.Response(503 if faulty(count) else 200, json=[count, json.loads(request.content)])

    transport = httpx.MockTransport(answer)
    transport.count = lambda: count
    return transport


async def until_it_answers(http, url, seen, most=99, **body):
    """As one writes it by hand: until the status is below 500."""
    for left in reversed(range(most)):
        answer = await http.post(url, **body)
        seen.append((answer.status_code, *answer.json()))
        if answer.status_code < 500 or not left:
            break
        await asyncio.sleep(random.random())
    return answer.raise_for_status().json()[0]


def test_anything_else_asked_makes_the_last_attempt_the_outcome():
    """The same request after that is another one, wherever the run dies; the code sees each failure again as it was."""

    async def ask(seen, transport):
        async with durable.AsyncClient(http=httpx, transport=transport) as http:
            for _ in range(2):
                answer = await http.post("http://x/y", json=1)
                seen.append((answer.status_code, *answer.json()))
                await asyncio.sleep(1)
            await durable.run("note", str, 1)
            return await until_it_answers(http, "http://x/y", seen, json=1)

    async def main():
        for nth in range(1, 30):
            store, transport, lives = MemoryStore(), numbered(lambda n: n < 6), ([], [])
            async with runtime(store, clock=FakeClock(), crash="after:write", nth=nth) as process:
                await bound(ask, lives[0], transport).start(id="1")
            async with runtime(store, clock=FakeClock()):
                run = bound(ask, lives[1], transport).start(id="1")
                last = await run
                found = [(step.name, step.status, step.attempts) for step in run.steps]
            seen = lives[1] or lives[0]  # it had ended
            request, number = "POST http://x/y", len(seen)
            assert found == [(request, "failed", 2), ("note", "completed", 1), (request, "completed", number - 2)], nth
            assert seen[: len(lives[0])] == lives[0]
            assert [status for status, *_ in seen] == [503] * (number - 1) + [200]
            if not process.crashed:
                assert last == 6
                return
        raise AssertionError("it dies at every write")

    asyncio.run(main())


def test_a_request_that_was_edited_between_two_attempts_goes_on():
    """The next attempt sends what is asked now. Code that would make fewer attempts than are recorded is told so."""

    async def ask(seen, transport, body, once=False):
        async with durable.AsyncClient(http=httpx, transport=transport) as http:
            if once:
                return (await http.post("http://x/y", json=body)).status_code
            return await until_it_answers(http, "http://x/y", seen, json=body)

    async def main():
        store, seen, transport = MemoryStore(), [], numbered(lambda n: n < 3)
        async with runtime(store, clock=FakeClock(), crash="before:step", nth=3):
            await bound(ask, seen, transport, "first").start(id="1")
        assert seen == [(503, 1, "first"), (503, 2, "first")]
        seen.clear()
        async with runtime(store, clock=FakeClock()):
            assert [(step.status, step.attempts) for step in durable.get_run("1").steps] == [("retrying", 2)]
            with pytest.raises(durable.NonDeterminismError, match=r"a pause.* is missing; nothing was executed"):
                await bound(ask, seen, transport, "edited", True).start(id="1")
            run = bound(ask, seen, transport, "edited").start(id="1")
            run.resume()
            assert await run == 4
            assert [step.attempts for step in run.steps] == [3]
        assert seen == [(503, 1, "first"), (503, 2, "first"), (200, 4, "edited")]

    asyncio.run(main())


def test_a_failure_that_comes_after_the_code_has_given_up_is_no_attempt_of_the_next_request():
    late = []

    async def answer(request):
        late.append(asyncio.Event())
        number = len(late)
        if number == 1:
            await late[0].wait()
        return httpx.Response(503 if number == 1 else 200, json=[number])

    async def ask(transport):
        async with durable.AsyncClient(http=httpx, transport=transport) as http:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(http.get("http://x/y"), 0.05)
            second = await http.get("http://x/y")
            late[0].set()
            await asyncio.sleep(0.3)  # in which the failure comes
            return *second.json(), *(await http.get("http://x/y")).json()

    async def main():
        async with runtime():
            run = bound(ask, httpx.MockTransport(answer)).start(id="1")
            assert await run == (2, 3)
            assert [(step.status, step.attempts) for step in run.steps] == [("failed", 1), ("completed", 1), ("completed", 1)]

    asyncio.run(main())


def test_a_fork_keeps_the_attempts_before_its_step_and_a_restart_none():
    async def ask(seen, transport):
        async with durable.AsyncClient(http=httpx, transport=transport) as http:
            first = await until_it_answers(http, "http://x/y", seen, json=1)
            second = await until_it_answers(http, "http://x/z", seen, json=2)
        return first, second

    async def main():
        seen, transport = [], numbered(lambda n: n in (1, 2, 4))
        async with runtime(clock=FakeClock()):
            run = bound(ask, seen, transport).start(id="1")
            assert await run == (3, 5)
            for at, found, attempts in (("POST http://x/z", (3, 6), [3, 1]), ("POST http://x/y", (7, 8), [1, 1])):
                fork = run.fork(at=at)
                assert await fork == found
                assert [step.attempts for step in fork.steps] == attempts
            run.restart()
            assert await run == (9, 10)

    asyncio.run(main())


RETRIED = f"""
import openai
@durable.workflow
async def retried(url):
    async with durable.AsyncClient() as http:
        llm = openai.AsyncOpenAI(base_url=url, api_key="{KEY}", http_client=http, max_retries=2)
        return (await llm.chat.completions.create(model="small", messages={SAY!r})).choices[0].message.content
"""


@pytest.mark.kernel
def test_a_workflow_that_is_killed_between_two_attempts_makes_the_next_one(tmp_path, server):
    """When the pause that the service asked for is over."""
    server.next(Fault(429, retry_after=3))
    with kernel(tmp_path) as k:
        k.run(f"{RETRIED}\nrun = retried.start({server.openai_url!r}, id='1')")
        until(lambda: k.value("str(durable.get_run('1').status)") == "retrying", "the service has asked for a pause")
        k.kill()
        resume = "run = durable.get_run('1')\nrun.resume()\n(await run, [step.attempts for step in run.steps])"
        found = k.run(f"{RETRIED}\n{resume}")
        assert found.result == "('You said: the blue house', [2])", found.traceback
    assert server.count == 2
    assert not files_with(tmp_path / ".durable_nb", KEY)


@pytest.mark.parametrize("most", [2, 99])
@pytest.mark.parametrize("seed", range(8))
def test_tasks_that_try_again_see_in_each_life_what_they_saw_before(seed, most):
    """Equal requests among them, a step here and there, deaths at any write; giving up after two attempts ends the run, which
    is resumed. An answer that was recorded is never asked for again."""  # fmt: skip
    rng = random.Random(seed)
    plans = [[(rng.choice("ab"), rng.random() < 0.3) for _ in range(3)] for _ in range(3)]
    fails = [rng.random() < 0.4 for _ in range(500)]

    async def lane(http, plan, seen):
        for what, noted in plan:
            await until_it_answers(http, "http://x/y", seen, most, json=what)
            if noted:
                await durable.run("note", str, what)

    async def main():
        store, clock, lives, transport, deaths = MemoryStore(), FakeClock(), [], numbered(fails.__getitem__), 0
        while True:
            seen, ended = [[] for _ in plans], False

            async def ask(seen=seen):
                async with durable.AsyncClient(http=httpx, transport=transport) as http:
                    await asyncio.gather(*(lane(http, *one) for one in zip(plans, seen, strict=True)))

            async with runtime(store, clock=clock, crash="after:write", nth=rng.randrange(1, 20)) as process:
                run = redefine(ask).start(id="1")
                with contextlib.suppress(httpx.HTTPStatusError, durable.StepFailed):
                    run.resume()
                    await run
                    ended = True
            deaths += process.crashed
            lives += [seen] if any(seen) else []  # else it died early, or had ended
            if ended and not process.crashed:
                break
        for before in lives if most == 99 else ():
            assert [last[: len(was)] for was, last in zip(before, lives[-1], strict=True)] == before
        answers = [answer[1] for one in lives[-1] for answer in one]
        assert len(set(answers)) == len(answers), "no answer is given twice"
        for plan, one in zip(plans, lives[-1], strict=True):
            assert [what for what, _ in plan] == [what for status, _, what in one if status == 200]
        paid = fails[1 : transport.count() + 1].count(False)
        assert paid <= 9 + 3 * deaths, "only what was under way when it died is asked for again"

    asyncio.run(main())


NOTEBOOK = """
import logging, os
logging.basicConfig(filename='log.txt', level=logging.DEBUG)
%load_ext durable_nb
import durable_nb as durable, anthropic, openai
key = os.environ['TEST_MODEL_KEY']

%%durable refused
bad = openai.AsyncOpenAI(base_url='URL/v1', api_key=key[::-1], http_client=durable.AsyncClient())
await bad.models.list()

%%durable cut
good = anthropic.AsyncAnthropic(base_url='URL', api_key=key, http_client=durable.AsyncClient(), max_retries=0)
await good.messages.create(model='small', max_tokens=9, messages=[{'role': 'user', 'content': 'hi'}])

%%durable url
url = 'URL/v1/models'.replace('//', f'//me:{key}@')
answer = await durable.call('models', f'{url}?api_key={key}', headers={'X-Api-Key': key})
answer, answer.request.url, answer.request.headers, vars(answer)
del url

%%durable gone
await durable.call('gone', f'http://me:{key}@127.0.0.1:1/?token={key}', retries=1)

%%durable client
found = await durable.AsyncClient(headers={'api-key': key, 'x-api-key': key}).get(f'URL/v1/models?key={key}')
found, found.request.headers, vars(found)

%durable
%durable why client
"""


@pytest.mark.kernel
def test_keys_are_nowhere(server, tmp_path):
    """Used in headers, URLs and `api_key=`, refused and accepted, shown and logged in full: not in the store, the saved
    notebook, or the log."""
    server.api_key = KEY
    server.next(None, Fault(cut_after=0))
    cells = NOTEBOOK.replace("URL", server.url).strip().split("\n\n")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    environment = {**os.environ, "TEST_MODEL_KEY": KEY, "IPYTHONDIR": str(tmp_path / "ipython")}
    client = NotebookClient(notebook, timeout=120, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel(env=environment, cwd=str(tmp_path)):
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
    nbformat.write(notebook, tmp_path / "saved.ipynb")
    saved = (tmp_path / "saved.ipynb").read_text()
    for told in ("AuthenticationError", "APIConnectionError", "ConnectError", "[redacted]"):
        assert told in saved, saved
    assert "HTTP Request: GET" in (tmp_path / "log.txt").read_text()
    assert server.requests[2].headers["x-api-key"] == KEY
    for key in (KEY, KEY[::-1]):
        assert not files_with(tmp_path, key)


def test_no_attempt_begins_after_the_total_time_out():
    async def main():
        for total, attempts in ((None, 4), (200, 4), (25, 3), ("15s", 2), (0, 1)):
            async with answering(ok(b"", b"Retry-After: 10", status=b"503 No")) as (url, seen):
                answer = await called(url, clock=FakeClock(), total_timeout=total, read=lambda answer: answer.status_code)
            assert (answer, len(seen)) == (503, attempts), total

    asyncio.run(main())


def test_a_stream_without_a_length_is_whole_when_its_last_event_has_come(tmp_path):
    """Its end looks like a cut connection: without the last event nothing is recorded, and the next execution asks again."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    chunk = b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{}}]}\n\n'
    begun = b'event: message_start\ndata: {"type":"message_start"}\n\n'
    ended = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    own = b"data: 1\n\ndata: 2\n\n"
    cases = {
        "openai": (head + chunk * 2, head + chunk * 2 + b"data: [DONE]\n\n"),
        "anthropic": (head + begun, head + begun + ended),
        "neither": (None, head + own),
    }

    async def rates(url):
        async with durable.AsyncClient(http=httpx) as http:
            return (await http.get(url)).text

    async def main():
        for name, (cut, whole) in cases.items():
            async with answering(*([cut] if cut else []), whole) as (url, seen), runtime(tmp_path / name):
                run = redefine(rates).start(url, id=name)
                if cut is not None:
                    with pytest.raises(httpx.RemoteProtocolError, match="before its last event"):
                        await run
                    run.resume()
                assert (await run).encode() == whole.removeprefix(head)
                assert len(seen) == (1 if cut is None else 2)

    asyncio.run(main())


def test_a_web_socket_is_refused_in_a_run(server):
    async def rates():
        async with durable.AsyncClient() as http:
            await http.get(server.url, headers={"Connection": "upgrade", "Upgrade": "websocket"})

    async def main():
        async with runtime():
            with pytest.raises(durable.NotSupportedError, match="in a step"):
                await redefine(rates).start()

    asyncio.run(main())
    assert server.count == 0


@pytest.mark.kernel
def test_cookies_are_kept_by_the_client_and_not_recorded(shared):
    """A login and what needs it work in a cell; the cookie is in no response, and not on disk."""

    async def main():
        login = ok(b"in", b"Set-Cookie: session=swordfish-0123456789; Path=/")
        async with answering(login, ok(b"yes")) as (url, seen):
            cell = f"""%%durable cookies
http = durable.AsyncClient()
answers = [await http.get("{url}/login"), await http.get("{url}/page")]
[dict(answer.cookies) for answer in answers], [answer.headers.get("set-cookie") for answer in answers]"""
            found = await asyncio.to_thread(shared.run, cell)
            assert found.result == "([{}, {}], [None, None])", found.traceback
            assert b"session=swordfish-0123456789" in seen[1]

    asyncio.run(main())
    assert not files_with(shared.folder / ".durable_nb", "swordfish")
