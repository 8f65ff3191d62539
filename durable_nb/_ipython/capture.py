"""What a cell and each of its steps display: noted while it is shown, so that it can be shown again.

In a kernel the streams are noted by ipykernel's own message hooks, on the thread that sends them: that also catches loggers
that kept the stream, and processes that write to its file descriptor. Which step wrote is told by a mark in the parent
header, a context variable since ipykernel 7.1; before that, and for threads of the user's own, output counts for the cell
only. Elsewhere (a terminal, a `%%capture` above) the streams are wrapped for the cell's duration.
"""

from __future__ import annotations

import contextlib
import html
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import msgspec

OURS = "durable_nb"
"""Displays whose metadata has this key are the package's own, and no output of the cell."""

_MARK = "durable_nb_step"

STDOUT, STDERR, DISPLAY, UPDATE, CLEAR, RESULT = "stdout", "stderr", "display", "update", "clear", "result"


@dataclass(slots=True)
class Output:
    """One thing shown. `content`: text of a stream, the arguments of `publish`, a flag, or the number of a result."""

    kind: str
    content: Any
    step: str = ""


class Recorder:
    """Notes what one cell shows while it is entered."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._outputs: list[Output] = []
        self._by_step: defaultdict[str, list[Output]] = defaultdict(list)
        self._lock = threading.Lock()
        self._paused = False
        self.problems: list[str] = []
        """What was shown in a way that can't be shown again."""
        self._bars: list[tuple[dict[str, Any], Any]] = []

    def note(self, kind: str, content: Any, step: str = "") -> None:
        """Something was shown."""
        if self._paused:
            return
        with self._lock:
            last = self._outputs[-1] if self._outputs else None
            if last is not None and kind in (STDOUT, STDERR) and (last.kind, last.step) == (kind, step):
                last.content += content
            else:
                self._add(Output(kind, content, step))

    def _add(self, output: Output) -> None:
        self._outputs.append(output)
        self._by_step[output.step].append(output)

    @contextlib.contextmanager
    def result(self, value: Any, number: int) -> Iterator[None]:
        """Meanwhile the cell's Nth value is displayed; it is noted as that, with the forms it was shown in, not as what a
        terminal prints of it. What the value's own `__repr__` shows is an output like any other."""
        _flush()
        self._paused = True

        def noting(forms: Callable[[], Any]) -> Any:
            self._paused = False
            try:
                found = forms()
                _flush()
            finally:
                self._paused = True
            with self._lock:
                self._add(Output(RESULT, (number, *found)))
            return found

        try:
            with _formatting(self._shell, value, noting):
                yield
        finally:
            _flush_written(_kernel_streams())
            self._paused = False

    def bar(self, shown: dict[str, Any], widget: Any) -> None:
        """`shown` stands for a progress bar, whose widget nobody can show again."""
        self._bars.append((shown, widget))

    def outputs(self) -> list[Output]:
        """All so far, in order. Progress bars show how far they have come."""
        _flush()
        return self._noted(self._outputs)

    def _noted(self, outputs: list[Output]) -> list[Output]:
        with self._lock:
            for shown, widget in self._bars:
                shown["text/plain"] = _text_of_bar(widget)
            return list(outputs)

    def written_by(self, path: str) -> list[str]:
        """What the step `path` has written so far, as far as it was sent."""
        with self._lock:
            return [o.content for o in self._by_step.get(path, ()) if o.kind in (STDOUT, STDERR)]

    @contextlib.contextmanager
    def step(self, path: str) -> Iterator[Callable[[], bytes]]:
        """What the calling task shows meanwhile belongs to the step `path`; the callable gives it, encoded."""
        with _marked(self._shell, path) as may_have_written:

            def shown() -> bytes:
                if may_have_written():
                    _flush()
                return encode(self._noted(self._by_step[path])) if path in self._by_step else b""

            yield shown

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Note the cell that is being executed."""
        streams = _kernel_streams()
        with contextlib.ExitStack() as stack:
            stack.enter_context(_noting_displays(self._shell, self, by_message=bool(streams)))
            if streams:
                stack.enter_context(_hooked(streams, self))
            else:
                stack.enter_context(_wrapped(self))
            stack.enter_context(_noting_tracebacks(self._shell, self))
            yield


def encode(outputs: list[Output]) -> bytes:
    """Outputs as bytes; empty where there are none."""
    return msgspec.msgpack.encode([(o.kind, o.content) for o in outputs]) if outputs else b""


@contextlib.contextmanager
def _formatting(shell: Any, value: Any, instead: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Meanwhile `value` is turned into what is displayed of it by `instead`, which is given the formatter's own way."""
    formatter = shell.display_formatter
    original = formatter.format

    def format_(obj: Any, *args: Any, **kwargs: Any) -> Any:
        if obj is not value:
            return original(obj, *args, **kwargs)
        formatter.format = original  # what the value displays while it is formatted is formatted as ever
        return instead(lambda: original(obj, *args, **kwargs))

    formatter.format = format_
    try:
        yield
    finally:
        del formatter.format


def formatted(shell: Any, value: Any, forms: Any) -> contextlib.AbstractContextManager[None]:
    """Meanwhile `value` is displayed in `forms`: data and metadata by MIME type."""
    return _formatting(shell, value, lambda _: forms)


def show_again(shell: Any, data: bytes, show_result: Callable[[int, Any], None]) -> None:
    """Display what was encoded; `show_result` displays the Nth value of the cell. How it looked is known: no `__repr__` is
    asked again."""  # fmt: skip
    for kind, content in msgspec.msgpack.decode(data) if data else ():
        if kind in (STDOUT, STDERR):
            stream = getattr(sys, kind)
            stream.write(content)
            stream.flush()
        elif kind == CLEAR:
            shell.display_pub.clear_output(wait=content)
        elif kind == RESULT:
            number, *forms = content
            show_result(number, tuple(forms))
        else:
            data_, metadata, transient = content
            shell.display_pub.publish(data_, metadata, transient=transient, update=kind == UPDATE)


def _flush() -> None:
    """What was written so far is sent, and noted, when this returns."""
    streams = _kernel_streams()
    if not _flush_written(streams or (sys.stdout, sys.stderr)):  # the thread that sends may be in the midst of it
        _on_sending_thread(streams[0], lambda: None)


def _flush_written(streams: Iterable[Any]) -> bool:
    """Flushes those that something was written to; was there any?"""
    written = [stream for stream in streams if getattr(stream, "_flush_pending", True)]
    for stream in written:
        stream.flush()
    return bool(written)


def _on_sending_thread(stream: Any, do: Callable[[], None]) -> None:
    """Returns when that was done, and all that was scheduled before it."""
    done = threading.Event()

    def on_thread() -> None:
        do()
        done.set()

    stream.pub_thread.schedule(on_thread)
    done.wait(5)


@contextlib.contextmanager
def _noting_tracebacks(shell: Any, recorder: Recorder) -> Iterator[None]:
    """A traceback that is shown while the cell continues, as of a figure that fails to draw, is a message of its own."""
    show = shell._showtraceback

    def noting(kind: Any, value: Any, trace: Any) -> Any:
        recorder.problems.append(f"it shows a traceback ({getattr(kind, '__name__', kind)}) and continues")
        return show(kind, value, trace)

    shell._showtraceback = noting
    try:
        yield
    finally:
        if vars(shell).get("_showtraceback") is noting:  # else a cell has begun while this one was in the background
            del shell._showtraceback


@contextlib.contextmanager
def muted(shell: Any) -> Iterator[None]:
    """Meanwhile nothing that the calling thread displays is seen: what importing a module shows is shown with the outputs."""
    publisher, thread = shell.display_pub, threading.get_ident()
    publish = publisher.publish

    def publish_others(*args: Any, **options: Any) -> Any:
        return None if threading.get_ident() == thread else publish(*args, **options)

    outer = vars(publisher).get("publish")
    publisher.publish = publish_others
    try:
        yield
    finally:
        del publisher.publish
        if outer is not None:
            publisher.publish = outer


# -- displays ----------------------------------------------------------------------------------------------------------

_WIDGET = "application/vnd.jupyter.widget-view+json"


@contextlib.contextmanager
def _noting_displays(shell: Any, recorder: Recorder, *, by_message: bool) -> Iterator[None]:
    """Wrap `publish` on the instance: ipykernel's hooks see only displays of the thread that registered them."""
    publisher = shell.display_pub
    publish, clear = publisher.publish, publisher.clear_output
    cell, is_on = _message_id(publisher), True

    def noting_publish(data: Any, metadata: Any = None, **options: Any) -> Any:
        if is_on and OURS not in (metadata or {}) and (not by_message or _message_id(publisher) == cell):
            _flush()
            kept = {mime: content for mime, content in data.items() if mime != _WIDGET}
            kind = UPDATE if options.get("update") else DISPLAY
            widget = _bar_in(data)
            if widget is not None:
                recorder.bar(kept, widget)
            recorder.note(kind, (kept, metadata or {}, options.get("transient") or {}), _mark_of(publisher))
        return publish(data, metadata, **options)

    def noting_clear(wait: bool = False) -> Any:
        if is_on:
            _flush()
            recorder.note(CLEAR, wait, _mark_of(publisher))
        return clear(wait)

    outer = {name: vars(publisher)[name] for name in ("publish", "clear_output") if name in vars(publisher)}
    publisher.publish, publisher.clear_output = noting_publish, noting_clear
    try:
        yield
    finally:
        is_on = False
        if vars(publisher).get("publish") is noting_publish:  # else another cell has begun, which passes on to this one's
            del publisher.publish, publisher.clear_output
            vars(publisher).update(outer)  # a durable cell inside a durable cell


def _bar_in(data: Any) -> Any:
    """The box of tqdm's bar that is displayed; None for anything else."""
    if _WIDGET not in data or "tqdm.notebook" not in sys.modules:
        return None
    from ipywidgets.widgets import widget

    found = widget._instances.get(data[_WIDGET].get("model_id"))
    return found if type(found).__name__ == "TqdmHBox" else None


def _text_of_bar(box: Any) -> str:
    """As tqdm writes it in a terminal. Its own text is that of an object which is gone when its loop has ended."""
    if box.layout.visibility == "hidden":  # leave=False
        return ""
    left, bar, right = box.children
    full = round(10 * bar.value / bar.max) if bar.max else 0
    texts = [html.unescape(part.value).replace("\u2007", " ") for part in (left, right)]
    return f"{texts[0]}|{'█' * full}{' ' * (10 - full)}|{texts[1]}"


# -- streams of a kernel -----------------------------------------------------------------------------------------------


def _kernel_streams() -> list[Any]:
    streams = [sys.stdout, sys.stderr]
    return streams if all(hasattr(s, "register_hook") and hasattr(s, "pub_thread") for s in streams) else []


@contextlib.contextmanager
def _hooked(streams: list[Any], recorder: Recorder) -> Iterator[None]:
    """Hooks are thread-local, so they are registered on the thread that sends."""
    cell = streams[0].parent_header.get("msg_id")

    def hook(message: dict[str, Any]) -> dict[str, Any]:
        parent = message.get("parent_header") or {}
        step = parent.pop(_MARK, "")
        if parent.get("msg_id") == cell:
            recorder.note(message["content"]["name"], message["content"]["text"], step)
        return message

    def register(method: str) -> None:
        for stream in streams:
            getattr(stream, method)(hook)

    _flush_written(streams)  # what earlier code wrote is not this cell's
    _on_sending_thread(streams[0], lambda: register("register_hook"))
    try:
        yield
    finally:
        _flush_written(streams)
        _on_sending_thread(streams[0], lambda: register("unregister_hook"))


def _message_id(publisher: Any) -> str:
    return str((getattr(publisher, "parent_header", None) or {}).get("msg_id", ""))


def _mark_of(publisher: Any) -> str:
    header = getattr(publisher, "parent_header", None)
    return str(header.get(_MARK, "")) if isinstance(header, dict) and header else _step_in_terminal.get()


class _Header(dict[str, Any]):
    """A parent header that knows whether a stream has asked for it, which ipykernel's do when something is written."""

    was_asked = False

    def items(self) -> Any:
        self.was_asked = True
        return super().items()


def _asks_for_items(stream: Any) -> bool:
    code = getattr(getattr(type(stream), "write", None), "__code__", None)
    return code is not None and {"parent_header", "items"} <= set(code.co_names)


@contextlib.contextmanager
def _marked(shell: Any, path: str) -> Iterator[Callable[[], bool]]:
    """Mark what the calling task shows; the callable tells whether anything is on its way through a kernel's stream, and is to
    be flushed. The variables are those of the task's own context, so nothing needs resetting but for synchronous code that goes
    on in it."""  # fmt: skip
    marked, headers, is_told = [], [], True
    places: list[Any] = [sys.stdout, sys.stderr, shell.display_pub]
    for place in places:
        variable = getattr(place, "_parent_header", None)
        if isinstance(variable, ContextVar):
            header = _Header({**place.parent_header, _MARK: path})
            marked.append((variable, variable.set(header)))
            if place is not shell.display_pub:  # which passes on at once what it is given
                headers.append(header)
                is_told &= _asks_for_items(place)
    token = _step_in_terminal.set(path)
    try:
        yield lambda: not is_told or any(header.was_asked for header in headers)
    finally:
        _step_in_terminal.reset(token)
        for variable, old in marked:
            variable.reset(old)


# -- streams elsewhere -------------------------------------------------------------------------------------------------

_step_in_terminal: ContextVar[str] = ContextVar("durable_nb_step_showing", default="")


class _Noting:
    """A stream that passes everything on, and notes what is written."""

    def __init__(self, stream: Any, kind: str, recorder: Recorder) -> None:
        self._stream, self._kind, self._recorder = stream, kind, recorder

    def write(self, text: str) -> Any:
        self._recorder.note(self._kind, text, _step_in_terminal.get())
        return self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _wrapped(recorder: Recorder) -> Iterator[None]:
    before = sys.stdout, sys.stderr
    wrappers = _Noting(before[0], STDOUT, recorder), _Noting(before[1], STDERR, recorder)
    sys.stdout, sys.stderr = wrappers
    try:
        yield
    finally:
        if sys.stdout is wrappers[0]:
            sys.stdout = before[0]
        if sys.stderr is wrappers[1]:
            sys.stderr = before[1]
