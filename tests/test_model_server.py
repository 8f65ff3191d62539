"""The model server for tests and demos: what the real packages are told by it, and its faults."""

from __future__ import annotations

import json
import subprocess
import sys

import anthropic
import httpx
import openai
import pytest

from durable_nb.testing import Fault, ModelServer

SAY = [{"role": "user", "content": "the blue house"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
CHAT = {"model": "small", "messages": SAY}


@pytest.fixture
def server():
    with ModelServer() as server:
        yield server


def test_the_openai_package_is_answered(server):
    """Chat with and without a stream, tool calls, responses, embeddings, models."""
    with openai.OpenAI(base_url=server.openai_url, api_key="k", max_retries=0) as client:
        answer = client.chat.completions.create(**CHAT)
        assert answer.choices[0].message.content == "You said: the blue house"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 5)
        chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "You said: the blue house"
        assert chunks[-1].usage.total_tokens == 8
        tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
        [call] = client.chat.completions.create(**CHAT, tools=tools).choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "the blue house", "days": 1}
        result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        answer = client.chat.completions.create(model="small", messages=[*SAY, result], tools=tools)
        assert answer.choices[0].message.content == "You said: rain"
        with client.responses.stream(model="small", input="a b") as stream:
            assert len(list(stream)) > 5
            assert stream.get_final_response().output_text == "You said: a b"
        assert len(client.embeddings.create(model="small", input=["a", "b"]).data) == 2
        assert [model.id for model in client.models.list()] == ["small"]


def test_the_anthropic_package_is_answered(server):
    """Messages with and without a stream, and tool calls."""
    more = {"model": "small", "max_tokens": 99}
    with anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0) as client:
        assert client.messages.create(messages=SAY, **more).content[0].text == "You said: the blue house"
        tools = [{"name": "weather", "input_schema": SCHEMA}]
        for tool in (None, tools):
            with client.messages.stream(messages=SAY, **more, **({"tools": tool} if tool else {})) as stream:
                assert len(list(stream)) > 5
                [block] = stream.get_final_message().content
        assert block.input == {"city": "the blue house", "days": 1}
        result = {"type": "tool_result", "tool_use_id": block.id, "content": "rain"}
        answer = client.messages.create(messages=[*SAY, {"role": "user", "content": [result]}], tools=tools, **more)
        assert answer.content[0].text == "You said: rain"


def test_faults_happen_to_the_requests_that_come_next(server):
    """Statuses with Retry-After, cut and hanging answers, a wrong key; and what is counted."""
    url = f"{server.openai_url}/chat/completions"
    server.next(Fault(429, retry_after=2), None, Fault(500), Fault(cut_after=0), Fault(cut_after=1), Fault(hang_after=1))
    with httpx.Client(timeout=0.3) as client:
        refused = client.post(url, json=CHAT)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        assert [client.post(url, json=CHAT).status_code for _ in range(2)] == [200, 500]
        for error in (httpx.RemoteProtocolError, httpx.RemoteProtocolError, httpx.ReadTimeout):
            with pytest.raises(error):
                client.post(url, json=CHAT)
        server.next(Fault(cut_after=3), Fault(hang_after=3))
        for error in (httpx.RemoteProtocolError, httpx.ReadTimeout):
            with client.stream("POST", url, json={**CHAT, "stream": True}) as stream, pytest.raises(error):
                for n, event in enumerate(event for event in stream.iter_lines() if event):
                    assert n < 3, event
        server.api_key = "right"
        assert client.post(url, json=CHAT).status_code == 401
        assert client.post(url, json=CHAT, headers={"Authorization": "Bearer right"}).status_code == 200
        assert client.post(url, content=b"no json", headers={"x-api-key": "right"}).status_code == 400
        assert client.get(f"{server.url}/requests").json() == {"count": server.count} == {"count": 11}
        assert sum(server.answered.values()) == 2
    server.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_a_share_of_the_requests_fails_at_the_first_attempt():
    """Which ones is told by their bodies; the second attempt succeeds."""
    with ModelServer(failing=0.2) as server, httpx.Client() as client:
        failed = []
        for n in range(100):
            try:
                answer = client.post(f"{server.openai_url}/embeddings", json={"model": "m", "input": str(n)})
                failed += [n] if answer.status_code >= 400 else []
            except httpx.RemoteProtocolError:
                failed.append(n)
        assert 10 <= len(failed) <= 30
        for n in failed:
            assert client.post(f"{server.openai_url}/embeddings", json={"model": "m", "input": str(n)}).status_code == 200
        assert set(server.answered.values()) == {1}


def test_it_serves_as_a_process_of_its_own():
    code = "from durable_nb.testing import ModelServer; ModelServer(reply=lambda system, messages: 'no').serve_forever()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()
        answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        process.kill()
    assert answer.json()["choices"][0]["message"]["content"] == "no"


def test_a_port_that_is_taken_is_an_error():
    with ModelServer() as server, pytest.raises(OSError, match=str(server.port)):
        ModelServer(server.port).start()
