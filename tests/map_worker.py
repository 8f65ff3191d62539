"""One execution of a cell that maps rows over a model server, to be killed: `map_worker.py STORE URL ROWS CONCURRENCY`.

Says each thousandth row that is done, and at the end a line of JSON: the digest of the results, how many rows were asked for,
by how many MB memory grew between the first thousand and the last.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from pathlib import Path
from urllib.parse import urlsplit

import durable_nb as durable
from durable_nb._engine import Asked, Engine
from durable_nb._facts import Status
from durable_nb._store import Store


class Refused(Exception):
    """As an HTTP library raises it: with the response."""

    def __init__(self, status, headers):
        super().__init__(status)
        self.response = self
        self.status_code, self.headers = status, headers


class Client:
    """Speaks as much HTTP as the server needs, in a tenth of the time that a real client takes."""

    def __init__(self, url):
        self.port, self.free, self.done, self.grown = urlsplit(url).port, [], 0, []

    def __reduce__(self):
        return Client, ("http://127.0.0.1:1",)  # the same value whatever the port

    async def ask(self, text):
        reader, writer = self.free.pop() if self.free else await asyncio.open_connection("127.0.0.1", self.port)
        try:
            body = json.dumps({"model": "small", "messages": [{"role": "user", "content": text}]}).encode()
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in head[1:-2])}
            answer = await reader.readexactly(int(headers["content-length"]))
        except BaseException:
            writer.close()
            raise
        self.free.append((reader, writer))
        if (status := int(head[0].split()[1])) >= 400:
            raise Refused(status, headers)
        self.note()
        return json.loads(answer)["choices"][0]["message"]["content"]

    def note(self):
        self.done += 1
        if self.done % 1000 == 0:
            self.grown.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6)
            print(self.done, flush=True)


client = Client(sys.argv[2])


async def label(row):
    return {"label": await client.ask(f"Which label has row {row['n']}?"), "n": row["n"]}


async def main(path, count, concurrency):
    store = Store(Path(path))
    run = await Engine(store).begin(Asked("rows", "k"))
    run.observers.subscribe(lambda _: None)

    async def body():
        rows = [{"n": n, "text": f"row {n} of a long table"} for n in range(count)]
        return await durable.map("label", durable.step(label, backoff=0.1), rows, concurrency=concurrency)

    values = await run.execute(body())
    await run.finish(Status.INTERRUPTED)
    assert [value["n"] for value in values] == list(range(count))
    digest = hashlib.blake2b(json.dumps(values).encode()).hexdigest()
    grown = client.grown[-1] - client.grown[0] if client.grown else 0.0
    print(json.dumps({"digest": digest, "asked": client.done, "grown": grown}), flush=True)
    for _, writer in client.free:
        writer.close()
    store.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[3]), int(sys.argv[4])))
