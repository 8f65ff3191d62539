"""A change of the fingerprint's own format makes no step run again: what earlier formats give is asked too."""

from __future__ import annotations

import asyncio
import importlib
import shutil
import sys
from pathlib import Path

import pytest

import durable_nb as durable
from durable_nb import _arguments
from durable_nb import _fingerprint as fp
from durable_nb._engine import Asked, Engine
from durable_nb._facts import Status
from durable_nb._records import Outcome, unpack
from durable_nb._store import Store

CODE = Path(fp.__file__).parent


class Robot:
    def __init__(self, address):
        self.address = address


@pytest.fixture
def later(tmp_path, monkeypatch):
    """A version of the package that has FORMAT + 1, and keeps today's as `_formats` says."""
    package = tmp_path / "later_fingerprint"
    shutil.copytree(CODE, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CODE, package / f"_format{fp.FORMAT}", ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in [
        ("_tokens.py", f"FORMAT = {fp.FORMAT}\n", f"FORMAT = {fp.FORMAT + 1}\n"),
        ("_formats.py", "EARLIER: tuple[int, ...] = ()", f"EARLIER: tuple[int, ...] = ({fp.FORMAT},)"),
        ("_values.py", 'b"t%d:" % len(obj)', 'b"another tag%d:" % len(obj)'),
    ]:
        source = (package / name).read_text()
        assert old in source
        (package / name).write_text(source.replace(old, new))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield importlib.import_module("later_fingerprint")
    for name in [name for name in sys.modules if name.partition(".")[0] == "later_fingerprint"]:
        del sys.modules[name]


RATE = 2


def helper(x):
    return x * RATE


def charge(cart, **more):
    return [helper(item) for item in cart], more


def test_a_later_format_gives_another_identity_and_the_earlier_one_too(later):
    """The engine looks for records under each of them, the oldest first, and records under the last."""
    for ask in (
        lambda fingerprinter: fingerprinter.of_call(charge, ((1, 2),), {"unit": "kg"}),
        lambda fingerprinter: fingerprinter.of_call(helper, (1,)),
        lambda fingerprinter: fingerprinter.of_call(Robot, ("a",)),
        lambda fingerprinter: fingerprinter.of_value({"a": (1, [2]), "b": Robot("x")}),
    ):
        now, then = ask(later), ask(fp)
        assert (now.format, then.format) == (fp.FORMAT + 1, fp.FORMAT)
        assert now.digest != then.digest
        (earlier,) = now.earlier()
        assert (earlier.digest, earlier.components, earlier.format) == (then.digest, then.components, fp.FORMAT)
        assert tuple(then.earlier()) == ()


def test_a_digest_that_is_written_down_can_be_made_again_in_its_format(later):
    """Arguments of a run, or a file's state: whoever compares them asks for the format that they were written in."""
    assert later.in_format(fp.FORMAT).hash_value((1, 2)) == fp.hash_value((1, 2)) != later.hash_value((1, 2))
    assert later.in_format(fp.FORMAT + 1) is later
    with pytest.raises(ValueError, match=f"format {fp.FORMAT + 2} is not known .* it knows {fp.FORMAT}, {fp.FORMAT + 1}"):
        later.in_format(fp.FORMAT + 2)


def test_what_is_said_by_identify_counts_in_every_format(later):
    later.identify(Robot, lambda robot: robot.address)
    for fingerprinter in (later, later.in_format(fp.FORMAT)):
        assert fingerprinter.of_value(Robot("a")).opaque[0].configured
        assert fingerprinter.hash_value(Robot("a")) != fingerprinter.hash_value(Robot("b"))


def test_what_an_earlier_format_cannot_read_has_no_identity_in_it(later, monkeypatch):
    earlier = later.in_format(fp.FORMAT)

    def refuse(*_):
        raise earlier.Unhashable("value", "it can't be read")

    monkeypatch.setattr(earlier, "of_value", refuse)
    assert tuple(later.of_value(1).earlier()) == ()


def test_a_step_recorded_under_an_earlier_format_is_not_executed_again(later, tmp_path, monkeypatch):
    """After an upgrade the body does not run; a step that is new is recorded under the new format."""
    monkeypatch.setenv("DURABLE_NB_KEY_FILE", str(tmp_path / "signing.key"))
    ledger = str(tmp_path / "ledger")

    def pay(cart):
        with open(ledger, "a") as file:  # noqa: PTH123  as a user writes it
            file.write(cart)
        return f"paid {cart}"

    async def execute(*carts):
        store = Store(tmp_path / "store")
        try:
            run = await Engine(store).begin(Asked("cell", "k"))
            body = _asking(carts, pay)
            values = await run.execute(body)
            await run.finish(Status.COMPLETED)
            rows = store.journal.scan("step/")
            return values, sorted(unpack(store.signer, key, row, Outcome).provenance.fingerprint_format for key, row in rows)
        finally:
            store.close()

    assert asyncio.run(execute("a", "a")) == (["paid a", "paid a"], [fp.FORMAT] * 2)
    monkeypatch.setattr(_arguments, "_fingerprint", later)
    values, formats = asyncio.run(execute("a", "a", "b"))
    assert values == ["paid a", "paid a", "paid b"]
    assert formats == [fp.FORMAT, fp.FORMAT, fp.FORMAT + 1]
    assert Path(ledger).read_text() == "aab"


async def _asking(carts, pay):
    return [await durable.run("pay", pay, cart) for cart in carts]
