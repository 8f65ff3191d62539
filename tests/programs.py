"""Random workflow programs as data, and the workflow that executes one: ordinary asyncio of every kind over recorded steps.

Every body returns what it was asked for with a serial number of its own, and the caller checks that it got its own answer. So a
result that a replay hands to another request is seen at once, and so is a body that ran twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import random
import time
from collections import Counter
from typing import Any

import durable_nb as durable

Node = tuple[Any, ...]

JUNK: list[Any] = []
"""Moves the heap about, so that coroutines have other addresses in each life."""


class World:
    """The world outside, which all lives of a run have in common."""

    def __init__(self, seed: int) -> None:
        self.is_mended = False
        self.random = random.Random(seed)
        self._serials = itertools.count()

    def do(self, name: str, arg: Any, life: Life) -> tuple[str, Any, int]:
        """`life`: which one has begun it; a thread may end after its life."""
        done = name, arg, next(self._serials)
        life.done.append(done)
        return done

    def pause_s(self) -> float:
        return self.random.choice([0, 0, 0.001, 0.003]) * self.random.random()


def generate(rng: random.Random) -> Node:
    """A program: a sequence of up to three constructs, nested up to three deep."""
    names = itertools.count()
    return ("seq", [_node(rng, 0, names) for _ in range(rng.randrange(1, 4))])


_KINDS = (
    "seq seq seq gather gather_all group as_completed as_completed_steps first first_error wait_for timeout pool semaphore "
    "lock event condition shield generator forget try task context wait_set wait_some finally"
).split()


def _node(rng: random.Random, depth: int, names: Any) -> Node:
    def leaf() -> Node:
        name = rng.choice("abc") if rng.random() < 0.5 else f"s{next(names)}"
        return ("step", name, next(names) if rng.random() < 0.7 else 0)

    if depth >= 3 or rng.random() < 0.25:
        r = rng.random()
        if r < 0.72:
            return leaf()
        if r < 0.78:
            return ("pause", rng.choice([0, 0.001, 0.003]))
        if r < 0.82:
            return ("sleep", f"z{next(names)}", rng.choice([0, 1, 3600]))
        return ("fail", f"f{next(names)}") if r < 0.92 else ("yield", rng.randrange(1, 4))

    def some(n: int = 0) -> list[Node]:
        return [_node(rng, depth + 1, names) for _ in range(n or rng.randrange(2, 4))]

    kind = rng.choice(_KINDS)
    match kind:
        case "wait_for" | "timeout" | "wait_some":
            return (kind, some(), rng.choice([0.001, 0.003, 0.01]))
        case "pool":
            return (kind, [leaf() for _ in range(rng.randrange(2, 6))], rng.randrange(1, 4))
        case "semaphore":
            return (kind, some(3), rng.randrange(1, 3))
        case "try" | "finally":
            return (kind, some(), leaf())
    return (kind, some())


class Life:
    """One execution of a program."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.trace: list[Any] = []
        """What the program was told, in order."""
        self.done: list[tuple[str, Any, int]] = []
        """What its bodies did."""
        self.wrong: list[Any] = []
        """Answers to somebody else's question."""

    async def step(self, name: str, arg: Any) -> Any:
        world, rng = self.world, self.world.random
        fails = name.startswith("f") and name[1:].isdigit() and not world.is_mended

        def in_thread() -> Any:
            time.sleep(world.pause_s())
            if fails:
                raise RuntimeError(f"{name} is broken")
            return world.do(name, arg, self)

        async def on_loop() -> Any:
            await asyncio.sleep(world.pause_s())
            if fails:
                raise RuntimeError(f"{name} is broken")
            return world.do(name, arg, self)

        body = in_thread if rng.random() < 0.2 else on_loop

        def ask(_: Any) -> Any:  # the argument is the request's; which kind of body it has is no part of it
            return body()

        got = await durable.run(name, durable.step(ask, retries=0, thread=body is in_thread), arg)
        if tuple(got[:2]) != (name, arg):
            self.wrong.append((name, arg, got))
        self.trace.append(tuple(got))
        return got

    async def all(self, nodes: list[Node]) -> None:
        for node in nodes:
            await self.go(node)

    async def go(self, node: Node) -> Any:
        return await getattr(self, f"_{node[0]}")(*node[1:])

    async def _step(self, name: str, arg: Any) -> Any:
        return await self.step(name, arg)

    async def _fail(self, name: str) -> None:
        await self.step(name, 0)

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _sleep(self, name: str, seconds: float) -> None:
        await durable.sleep(name, seconds)

    async def _yield(self, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    async def _seq(self, nodes: list[Node]) -> None:
        await self.all(nodes)

    async def _gather(self, nodes: list[Node]) -> None:
        await asyncio.gather(*map(self.go, nodes))

    async def _gather_all(self, nodes: list[Node]) -> None:
        for result in await asyncio.gather(*map(self.go, nodes), return_exceptions=True):
            if isinstance(result, Exception):
                await self.step("alert", 0)

    async def _group(self, nodes: list[Node]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for node in nodes:
                    group.create_task(self.go(node))
        except* RuntimeError:
            await self.step("called off", 1)

    async def _as_completed(self, nodes: list[Node]) -> None:
        coros = []
        for node in nodes:
            _shake()
            coros.append(self.go(node))
        for n, nearest in enumerate(asyncio.as_completed(coros)):
            with contextlib.suppress(RuntimeError):
                value = await nearest
                await self.step("after", list(value) if value else n)

    async def _as_completed_steps(self, nodes: list[Node]) -> None:
        coros = []
        for n, _ in enumerate(nodes):
            _shake()
            coros.append(self.step("same", n))
        for nearest in asyncio.as_completed(coros):
            await self.step("after", list(await nearest))

    async def _first(self, nodes: list[Node]) -> None:
        await self._race(nodes, asyncio.FIRST_COMPLETED, None)

    async def _first_error(self, nodes: list[Node]) -> None:
        await self._race(nodes, asyncio.FIRST_EXCEPTION, None)

    async def _wait_some(self, nodes: list[Node], seconds: float) -> None:
        await self._race(nodes, asyncio.ALL_COMPLETED, seconds)

    async def _race(self, nodes: list[Node], until: str, seconds: float | None) -> None:
        tasks = [asyncio.create_task(self.go(node)) for node in nodes]
        ended, rest = await asyncio.wait(tasks, return_when=until, timeout=seconds)
        await self.step("won", sorted(tasks.index(task) for task in ended))
        for task in rest:
            if until == asyncio.FIRST_COMPLETED:
                task.cancel()
            else:
                with contextlib.suppress(RuntimeError):
                    await task
        for task in ended:
            if not task.cancelled():
                task.exception()

    async def _wait_set(self, nodes: list[Node]) -> None:
        ended, _ = await asyncio.wait({asyncio.create_task(self.go(node)) for node in nodes})
        for task in ended:
            error = task.exception()
            await self.step("got", str(error) if error else list(task.result() or ()))

    async def _wait_for(self, nodes: list[Node], seconds: float) -> None:
        try:
            await asyncio.wait_for(self.all(nodes), seconds)
        except TimeoutError:
            await self.step("fallback", 2)

    async def _timeout(self, nodes: list[Node], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.all(nodes)
        except TimeoutError:
            await self.step("fallback", 2)

    async def _pool(self, nodes: list[Node], count: int) -> None:
        queue: asyncio.Queue[Node] = asyncio.Queue()
        for node in nodes:
            queue.put_nowait(node)

        async def worker(number: int) -> None:
            while not queue.empty():
                node = queue.get_nowait()
                value = await self.go(node)
                await self.step("by", [number, *(value or ())])
                queue.task_done()

        workers = [asyncio.create_task(worker(n)) for n in range(count)]
        await queue.join()
        await asyncio.gather(*workers)

    async def _limited(self, nodes: list[Node], limit: Any) -> None:
        async def one(node: Node) -> None:
            async with limit:
                await self.go(node)

        await asyncio.gather(*map(one, nodes))

    async def _semaphore(self, nodes: list[Node], count: int) -> None:
        await self._limited(nodes, asyncio.Semaphore(count))

    async def _lock(self, nodes: list[Node]) -> None:
        await self._limited(nodes, asyncio.Lock())

    async def _event(self, nodes: list[Node]) -> None:
        event = asyncio.Event()

        async def setter() -> None:
            try:
                await self.go(nodes[0])
            finally:
                event.set()

        async def waiter(node: Node) -> None:
            await event.wait()
            await self.go(node)

        await asyncio.gather(setter(), *map(waiter, nodes[1:]))

    async def _condition(self, nodes: list[Node]) -> None:
        condition, count = asyncio.Condition(), [0]

        async def one(node: Node) -> None:
            try:
                await self.go(node)
            finally:
                async with condition:
                    count[0] += 1
                    condition.notify_all()

        tasks = [asyncio.create_task(one(node)) for node in nodes]
        async with condition:
            await condition.wait_for(lambda: count[0] >= 1)
        await self.step("condition", count[0])
        await asyncio.gather(*tasks)

    async def _shield(self, nodes: list[Node]) -> None:
        task = asyncio.create_task(self.all(nodes))
        try:
            await asyncio.wait_for(asyncio.shield(task), 0.003)
        except TimeoutError:
            await self.step("shielded", 0)
        await task

    async def _generator(self, nodes: list[Node]) -> None:
        async def each() -> Any:
            try:
                for node in nodes:
                    yield await self.go(node)
            finally:
                await self.step("closed", 0)

        async for value in each():
            if value and isinstance(value[1], int) and value[1] % 2:
                break
        await self.step("generated", 0)

    async def _forget(self, nodes: list[Node]) -> None:
        self.forgotten = asyncio.create_task(self.all(nodes))

    async def _task(self, nodes: list[Node]) -> None:
        await asyncio.create_task(self.all(nodes))

    async def _context(self, nodes: list[Node]) -> None:
        me = asyncio.current_task()
        assert me in asyncio.all_tasks()
        await asyncio.gather(*map(self.go, nodes))
        assert asyncio.current_task() is me

    async def _try(self, nodes: list[Node], instead: Node) -> None:
        try:
            await self.all(nodes)
        except RuntimeError:
            await self.go(instead)

    async def _finally(self, nodes: list[Node], last: Node) -> None:
        try:
            await self.all(nodes)
        finally:
            await self.go(last)


def _shake() -> None:
    JUNK.append([bytearray(random.randrange(600)) for _ in range(random.randrange(9))])
    if len(JUNK) > 200:
        JUNK.clear()


EDITS = ("append", "task", "parallel", "in a branch", "insert", "delete", "swap", "rename")


def edited(program: Node, rng: random.Random, how: str) -> Node | None:
    """The program with one change; None where it has no place for such a one."""
    program = copy.deepcopy(program)
    lists = _lists(program)
    _, nodes = rng.choice(lists)
    match how:
        case "append":
            program[1].append(("step", "new", 777))
        case "task":  # a helper now runs in a task of its own
            n = rng.randrange(len(nodes))
            nodes[n] = ("task", [nodes[n]])
        case "parallel" | "in a branch":
            branches = [found for kind, found in lists if kind in ("gather", "gather_all", "group", "lock")]
            if not branches:
                return None
            nodes = rng.choice(branches)
            n = rng.randrange(len(nodes))
            if how == "parallel":
                nodes.insert(0, ("step", "new", 777))
            else:
                nodes[n] = ("seq", [nodes[n], ("step", "new", 777)])
        case "insert":
            nodes.insert(rng.randrange(len(nodes)), ("step", "new", 777))
        case "delete" | "swap":
            if len(nodes) < 2:
                return None
            n = rng.randrange(len(nodes) - 1)
            if how == "delete":
                del nodes[n]
            elif nodes[n] == nodes[n + 1]:
                return None
            else:
                nodes[n], nodes[n + 1] = nodes[n + 1], nodes[n]
        case "rename":
            steps = [(found, n) for _, found in lists for n, node in enumerate(found) if node[0] == "step"]
            if not steps:
                return None
            found, n = rng.choice(steps)
            found[n] = ("step", "new", found[n][2])
    return program


def _lists(node: Any) -> list[tuple[str, list[Any]]]:
    found = []
    for part in node[1:] if isinstance(node, tuple) else ():
        if isinstance(part, list) and part and isinstance(part[0], tuple):
            found.append((node[0], part))
            for child in part:
                found += _lists(child)
        elif isinstance(part, tuple):
            found += _lists(part)
    return found


def unique(program: Node) -> set[tuple[str, Any]]:
    """Steps that the program asks for once at most."""
    counts: Counter[tuple[str, Any]] = Counter()

    def count(node: Any) -> None:
        if isinstance(node, tuple) and node and node[0] == "step":
            counts[node[1], node[2]] += 1
        elif isinstance(node, (tuple, list)):
            for part in node:
                count(part)

    count(program)
    return {step for step, n in counts.items() if n == 1}
