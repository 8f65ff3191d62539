"""`durable-nb serve`: real servers on real sockets, asked with httpx."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from lab import Lab
from standardwebhooks.webhooks import Webhook
from workers import until

pytest_plugins = ["lab"]

FLOWS = """
import asyncio
from pathlib import Path
import durable_nb as durable

HERE = Path(__file__).parent

def note(what):
    with (HERE / "done").open("a") as file:
        file.write(what + "\\n")
    return what

async def waits_for(gate):
    while not (HERE / gate).exists():
        await asyncio.sleep(0.01)
    return gate

def breaks():
    raise ValueError("out of stock")

@durable.workflow
async def order(item, *, amount=1):
    note("begins")
    await durable.run("charge", note, f"charge {item} {amount}")
    await durable.run("gate", waits_for, "gate")
    await durable.run("send", note, f"send {item}")
    return item

@durable.workflow
async def quick(n):
    return await durable.run("once", note, f"quick {n}")

@durable.workflow
async def asks():
    decision = await durable.approve("publish", "Publish it?")
    news = await durable.wait_for_event("news", "headline")
    return [decision.approved, decision.by, decision.comment, news.data]

@durable.workflow
async def listens(count):
    hook = durable.webhook("paid")
    async def tell():
        note(f"{hook.url} {hook.secret}")
    await durable.run("tell", tell)
    return [(await hook.wait()).data for _ in range(count)]

@durable.workflow
async def fails():
    await durable.run("breaks", breaks)
"""
PROGRAM = Path(sys.executable).with_name("durable-nb")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    monkeypatch.setenv("DURABLE_NB_DIR", str(tmp_path / "store"))
    monkeypatch.delenv("DURABLE_NB_TOKEN", raising=False)
    (tmp_path / "flows.py").write_text(FLOWS)
    return tmp_path


def serving(folder, *options, token=""):
    return served(folder, [PROGRAM, "serve", "flows", "--port", "0", *options], token=token)


@contextmanager
def served(folder, command, token=""):
    log = (folder / "log").open("a")
    process = subprocess.Popen(
        command,
        cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True,
        env={**os.environ, **({"DURABLE_NB_TOKEN": token} if token else {})},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("page http://"), (folder / "log").read_text()
        with httpx.Client(base_url=line.split()[1], timeout=30) as client:
            client.process = process
            yield client
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        log.close()


def start(client, workflow="order", **asked):
    answer = client.post(f"/workflows/{workflow}/runs", json=asked)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def status(client, run_id):
    return client.get(f"/runs/{run_id}").json()["status"]


def ended(client, run_id):
    until(lambda: status(client, run_id) in ("completed", "failed", "cancelled"), f"{run_id} to end")
    return client.get(f"/runs/{run_id}").json()


def done(folder):
    return (folder / "done").read_text().splitlines() if (folder / "done").exists() else []


def test_a_run_is_started_once_controlled_and_told_of(folder):
    with serving(folder) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        asked = {"args": ["tea"], "kwargs": {"amount": 2}, "id": "order-1", "labels": ["shop"]}
        assert start(client, **asked) == start(client, **asked) == "order-1"
        assert client.post("/workflows/order/runs", json={**asked, "args": ["coffee"]}).status_code == 409
        until(lambda: "charge tea 2" in done(folder), "the charge")
        listed = client.get("/runs", params={"label": "shop", "workflow": "order"}).json()["runs"]
        assert [(run["id"], run["workflow"], run["labels"]) for run in listed] == [("order-1", "order", ["shop"])]
        assert client.post("/runs/order-1/cancel", json={"reason": "sold out"}).status_code == 202
        told = ended(client, "order-1")
        assert (told["status"], "sold out" in told["error"]) == ("cancelled", True)
        assert client.post("/runs/order-1/resume").status_code == 202
        (folder / "gate").touch()
        told = ended(client, "order-1")
        assert told["status"] == "completed"
        assert [(step["name"], step["status"], step["attempts"]) for step in told["steps"]] == [
            ("charge", "completed", 1), ("gate", "completed", 1), ("send", "completed", 1),
        ]  # fmt: skip
        assert done(folder).count("charge tea 2") == 1
        assert client.post("/runs/order-1/restart").status_code == 202
        until(lambda: done(folder).count("send tea") == 2, "the order anew")
        start(client, "quick", args=[2], id="later", delay="1h")
        until(lambda: status(client, "later") == "pending", "the delay")
        due = client.get("/runs/later").json()
        assert 3500 < due["next_wake"] - due["started_at"] <= 3600.1
        failed = start(client, "fails")
        assert "out of stock" in ended(client, failed)["steps"][0]["error"]
        assert client.get("/runs", params={"status": "failed"}).json()["runs"][0]["id"] == failed


def test_an_id_with_a_slash_is_one_segment(folder):
    with serving(folder) as client:
        assert start(client, "quick", args=[1], id="a/b c/events") == "a/b c/events"
        assert ended(client, "a%2Fb%20c%2Fevents")["id"] == "a/b c/events"
        assert client.get("/runs/a/b").status_code == 404


def events(client, run_id, after=""):
    found = []
    headers = {"Last-Event-ID": after} if after else {}
    with client.stream("GET", f"/runs/{run_id}/events", headers=headers) as answer:
        if answer.status_code == 204:
            return None
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields = {}
        for line in answer.iter_lines():
            if line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                found.append((int(fields["id"]), fields.get("event", "message"), json.loads(fields["data"])))
                fields = {}
    return found


def test_every_listener_of_every_server_gets_the_same_rows_and_goes_on_after_the_last_it_has(folder):
    (folder / "gate").touch()
    with serving(folder) as client, serving(folder) as other:
        start(client, args=["tea"], id="r")
        heard = events(client, "r")
        assert heard == events(other, "r")
        assert heard[-1][1:] == ("end", {"status": "completed"})
        rows = heard[:-1]
        assert [seq for seq, _, _ in rows] == list(range(1, len(rows) + 1))
        assert [row["step"] for _, _, row in rows if row["what"] == "completed"] == ["charge", "gate", "send"]
        assert events(other, "r", after="2") == heard[2:]
        assert events(other, "r", after=str(rows[-1][0])) is None  # a browser asks no more


def test_a_killed_server_loses_nothing_and_the_other_goes_on(folder):
    with serving(folder) as first, serving(folder) as second:
        start(first, args=["tea"], id="r")
        until(lambda: "charge tea 1" in done(folder), "the charge")
        until(lambda: [s["status"] for s in second.get("/runs/r").json()["steps"]][:1] == ["completed"], "its record")
        first.process.kill()
        (folder / "gate").touch()
        assert ended(second, "r")["status"] == "completed"
    assert done(folder).count("charge tea 1") == done(folder).count("send tea") == 1


def test_decisions_and_events_come_over_http_each_once(folder):
    with serving(folder) as client:
        start(client, "asks", id="a")
        until(lambda: status(client, "a") == "waiting", "the question")
        assert client.post("/runs/a/decisions/nothing", json={"approved": True}).status_code == 404
        assert client.post("/runs/a/decisions/publish", json={}).status_code == 422
        said = client.post("/runs/a/decisions/publish", json={"approved": True, "comment": "fine"})
        assert said.json() == {"id": "a", "step": "publish", "approved": True}
        assert client.post("/runs/a/decisions/publish", json={"approved": False}).status_code == 409
        until(lambda: status(client, "a") == "waiting", "the wait for the event")
        assert client.post("/events/headline", json={"data": [1, None, True]}).status_code == 202
        told = ended(client, "a")
        assert told["status"] == "completed"
        assert client.post("/events/headline", json={"run_id": "a"}).status_code == 409
        assert client.post("/events/headline", json={"run_id": "b"}).status_code == 404
    code = "async def main():\n d.open(os.environ['DURABLE_NB_DIR'])\n print(await d.get_run('a'))\nasyncio.run(main())"
    shown = subprocess.run(
        [sys.executable, "-c", f"import asyncio, os, durable_nb as d\n{code}"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == "[True, 'over HTTP', 'fine', [1, None, True]]\n"


def test_a_webhook_takes_what_is_signed_once_and_nothing_else(folder):
    with serving(folder, "--url", "https://example.com/shop/", token="s3cret") as client:
        authorised = {"Authorization": "Bearer s3cret"}
        client.post("/workflows/listens/runs", json={"args": [2], "id": "l"}, headers=authorised)
        until(lambda: done(folder), "the address")
        url, secret = done(folder)[0].split()
        assert url.startswith("https://example.com/shop/webhooks/")
        path = url.removeprefix("https://example.com/shop")

        def post(body, post_id, *, at=0, signed=None, path=path):
            moment = datetime.now(UTC) + timedelta(seconds=at)
            headers = {
                "webhook-id": post_id,
                "webhook-timestamp": str(int(moment.timestamp())),
                "webhook-signature": Webhook(secret).sign(post_id, moment, signed or body),
            }
            return client.post(path, content=body, headers=headers).status_code

        assert post('{"paid": 1}', "m1", signed='{"paid": 2}') == 401
        assert post('{"paid": 1}', "m1", at=-400) == 401
        assert post('{"paid": 1}', "m1", at=400) == 401
        assert client.post(path, content="{}").status_code == 401
        assert post('{"paid": 1}', "m1", path=path[:-1] + ("0" if path[-1] != "0" else "1")) == 404
        assert post('{"paid": 1}', "m1", path="/webhooks/nothing") == 404
        assert [post('{"paid": 1}', "m1"), post('{"paid": 1}', "m1"), post("cash", "m2")] == [200, 200, 200]
        until(lambda: client.get("/runs/l", headers=authorised).json()["status"] == "completed", "both posts")
        assert post("more", "m3") == 409
    stored = b"".join(file.read_bytes() for file in (folder / "store").rglob("*") if file.is_file())
    token = path.rpartition("/")[2]
    assert token.encode() not in stored
    assert secret.encode() not in stored


@pytest.mark.parametrize(
    ("path", "body", "code", "says"),
    [
        ("/workflows/nothing/runs", "{}", 404, "there are asks, fails, listens, order, quick"),
        ("/workflows/quick/runs", '{"args": [1], "colour": 3}', 422, "unknown key 'colour'"),
        ("/workflows/quick/runs", '{"args": 1}', 422, "'args' can't be 1"),
        ("/workflows/quick/runs", '{"args": [1, 2]}', 422, "too many positional"),
        ("/workflows/quick/runs", '{"args": [1], "id": ""}', 422, "not empty"),
        ("/workflows/quick/runs", '{"args": [1], "id": true}', 422, "'id' can't be true"),
        ("/workflows/quick/runs", '{"args": [NaN]}', 400, "no JSON"),
        ("/workflows/quick/runs", "{", 400, "no JSON"),
        ("/workflows/quick/runs", "[" * 10_000, 400, "no JSON"),
        ("/workflows/quick/runs", "[]", 422, "JSON object"),
        ("/workflows/quick/runs", " " * (1 << 20) + "{}", 413, "are the most"),
        ("/runs/nothing/cancel", "", 404, "no run 'nothing'"),
        ("/runs", "", 405, "GET"),
        ("/../etc/passwd", "", 404, "nothing at"),
        ("/runs/%2e%2e/cancel", "", 404, "no run '..'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_makes_no_sense_is_refused_with_one_line(server, path, body, code, says):
    answer = server.post(path, content=body)
    assert answer.status_code == code, answer.text
    assert says in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert server.get("/runs").json() == {"runs": []}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "flows.py").write_text(FLOWS)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DURABLE_NB_KEY_FILE", str(folder / "signing.key"))
        patched.setenv("DURABLE_NB_DIR", str(folder / "store"))
        with serving(folder) as client:
            yield client


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "elsewhere.example:80"}, 403),
        ({"Content-Length": "nonsense"}, 400),
    ],
    ids=str,
)
def test_browsers_of_other_origins_and_other_names_are_refused(server, headers, code):
    address = httpx.URL(str(server.base_url))
    lines = {"Host": f"{address.host}:{address.port}", "Content-Length": "2", "Connection": "close"} | headers
    with socket.create_connection((address.host, address.port)) as raw:
        sent = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        raw.sendall(f"POST /workflows/quick/runs HTTP/1.1\r\n{sent}\r\n{{}}".encode())
        assert int(raw.recv(1 << 16).split()[1]) == code
    own = server.post("/workflows/quick/runs", headers={"Origin": str(server.base_url).rstrip("/")}, content="{}")
    assert own.status_code == 422  # its argument is missing: it came in


def test_with_a_token_nothing_but_the_health_is_told_without_it(folder):
    with serving(folder, token="s3cret") as client:
        assert client.get("/healthz").status_code == 200
        for wrong in (
            {},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": "Bearer é".encode()},
        ):
            answer = client.get("/runs", headers=wrong)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert client.get("/runs", headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_an_address_that_others_reach_wants_a_token_and_a_port_in_use_is_told(folder):
    def told(*options):
        done = subprocess.run(
            [PROGRAM, "serve", "flows", *options], cwd=folder, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        return done.stderr

    assert "set DURABLE_NB_TOKEN" in told("--host", "0.0.0.0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in told("--port", str(taken.getsockname()[1]))


APP = """
import os, socket, uvicorn
import durable_nb as durable
from starlette.applications import Starlette
from starlette.routing import Mount
durable.open(os.environ["DURABLE_NB_DIR"])
app = Starlette(routes=[Mount("/shop", app=durable.asgi("flows"))])
listening = socket.create_server(("127.0.0.1", 0))
print(f"page http://127.0.0.1:{listening.getsockname()[1]}/shop", flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listening])
"""


def test_mounted_in_an_application_it_does_the_same(folder):
    (folder / "gate").touch()
    with served(folder, [sys.executable, "-c", APP]) as client:
        run_id = start(client, args=["tea"], id="a/b")
        assert run_id == "a/b"
        assert ended(client, "a%2Fb")["status"] == "completed"
        assert events(client, "a%2Fb")[-1][1:] == ("end", {"status": "completed"})
        assert client.get("", follow_redirects=True).text.startswith("<!doctype html>")
        assert client.post("/workflows/quick/runs", json={"args": [1], "kwargs": {"on_conflict": "restart"}}).status_code == 422


@pytest.mark.browser
def test_the_page_shows_runs_live_and_its_buttons_act_after_the_token(folder, lab: Lab):
    with serving(folder, token="s3cret") as client:
        client.headers["Authorization"] = "Bearer s3cret"
        start(client, args=["tea"], id="order-1", labels=["shop"])
        start(client, "fails", id="broken-1")

        def look(page):
            said = []
            context = page.context.browser.new_context(viewport={"width": 1100, "height": 800})
            tab = context.new_page()
            tab.on("console", lambda one: said.append(one.text) if one.type in ("error", "warning") else None)
            tab.on("pageerror", lambda error: said.append(str(error)))
            try:
                tab.goto(str(client.base_url))
                tab.get_by_label("This server wants its token").fill("wrong")
                tab.get_by_role("button", name="Open").click()
                tab.get_by_text("That was not it.").wait_for()
                tab.get_by_label("This server wants its token").fill("s3cret")
                tab.get_by_role("button", name="Open").click()
                tab.get_by_role("cell", name="order order-1").or_(tab.get_by_text("order-1")).first.wait_for()
                tab.get_by_text("ValueError: out of stock").first.wait_for()
                tab.get_by_role("button", name="Steps of run order-1").click()
                run = tab.get_by_role("region", name="Run of order")
                run.get_by_text("charge").first.wait_for()
                (folder / "gate").touch()
                run.get_by_text("send").first.wait_for()
                run.get_by_text("completed").first.wait_for()
                until(lambda: status(client, "order-1") == "completed", "the order to end")
                tab.get_by_role("button", name="Restart").first.click()
                tab.get_by_text("Discard what is recorded?").click()
                until(lambda: "broken-1 begins anew" in tab.inner_text("body"), "the answer to the button")
            finally:
                context.close()
            return said

        assert lab.on_page(look) == []
