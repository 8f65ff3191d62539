"""Which of a run's requests an exception comes from: `resume()` tries these again."""

from __future__ import annotations

from typing import Any


class Blame:
    """The exceptions and answers that the code was given, and of which request. They are kept alive: identity tells them."""

    def __init__(self) -> None:
        self._errors: dict[int, tuple[int, BaseException]] = {}
        self._answers: dict[int, tuple[int, Any]] = {}

    def given(self, error: BaseException, request: int) -> None:
        self._errors[id(error)] = request, error

    def stands_for(self, error: BaseException, value: Any) -> None:
        """The code is given that value in place of `error` (an answer with a status of 400 or more)."""
        if id(error) in self._errors:
            self._answers[id(value)] = self._errors[id(error)][0], value

    def of(self, error: BaseException) -> tuple[int, ...]:
        """The requests whose exceptions are in what ended the run."""
        found, todo, seen = [], [error], set[int]()
        while todo:
            one = todo.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            if id(one) in self._errors:
                found.append(self._errors[id(one)][0])
                continue  # what it was raised in the handling of was caught, and the code went on from there
            response = getattr(one, "response", None)
            if id(response) in self._answers:
                found.append(self._answers[id(response)][0])
            inner = (one.__cause__, one.__context__, *(one.exceptions if isinstance(one, BaseExceptionGroup) else ()))
            todo += [other for other in inner if other is not None]
        if not found and self._answers:  # the code made an error of its own out of an answer's status
            found = [max(number for number, _ in self._answers.values())]
        return tuple(found)
