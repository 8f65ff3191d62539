"""What models' answers have cost, and what restoring has saved: tokens by run and model, and money where prices are given."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from importlib.util import find_spec
from typing import Any, cast

from durable_nb import _usage
from durable_nb._current import engine, refuse_in_workflow
from durable_nb._misuse import explained
from durable_nb._usage import COUNTS, Usage

_WAYS = ("run", "store")


class Ledger(list[dict[str, Any]]):
    """The rows, where there is no pandas to make a frame of them. Shown as a table."""

    def __repr__(self) -> str:
        if not self:
            return "no step has recorded a model's answer"
        lines = [list(self[0]), *([_said(value) for value in row.values()] for row in self)]
        widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
        return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


@explained
def ledger(*, by: str = "run", prices: Mapping[str, tuple[float, float]] | None = None) -> Any:
    """Return what was spent on models' answers and what restoring has saved: a pandas DataFrame, or else a list of dicts.

    One row for each run and model, the newest run first; with `by="store"` one for each model. Columns: `run`, `of`, `started`
    (by run), `model`, `requests`, `input_tokens`, `output_tokens`, and the same with `saved_` before, of what was restored
    instead of asked for again. With `prices`, for a million input and a million output tokens, also `cost` and `saved_cost`; a
    model's dated versions have its price, unless they have their own. NaN: the price is not known.

        durable.ledger(prices={"gpt-5-mini": (0.25, 2.00)})

    Counted are the answers of `chat`, `call`, `Client` and `AsyncClient`, in a step's body too, and those that a step returns
    as the openai and anthropic packages make them. Failed attempts are not.
    """
    refuse_in_workflow("durable.ledger()")
    if by not in _WAYS:
        raise ValueError(f"durable.ledger(by={by!r}): write 'run' or 'store'")
    table = _checked(prices)
    found = engine().used()
    rows = []
    if by == "run":
        for run in found:
            of = {"run": run.run_id, "of": run.name, "started": datetime.fromtimestamp(run.started_at)}  # noqa: DTZ006  people's time
            rows += [of | row for row in _rows(run.spent, run.saved, table)]
    else:
        spent, saved = Usage(), Usage()
        for run in found:
            _usage.add(spent, run.spent)
            _usage.add(saved, run.saved)
        rows = _rows(spent, saved, table)
    if find_spec("pandas") is None:
        return Ledger(rows)
    import pandas as pd

    return pd.DataFrame(rows, columns=_columns(by, priced=table is not None))


def _rows(spent: Usage, saved: Usage, prices: Mapping[str, tuple[float, float]] | None) -> list[dict[str, Any]]:
    rows = []
    none = dict.fromkeys(COUNTS, 0)
    for model in sorted({*spent, *saved}):
        of_it, not_again = spent.get(model, none), saved.get(model, none)
        row: dict[str, Any] = {"model": model, **of_it, **{f"saved_{name}": n for name, n in not_again.items()}}
        if prices is not None:
            row["cost"], row["saved_cost"] = (_usage.cost(counts, model, prices) for counts in (of_it, not_again))
        rows.append(row)
    return rows


def _columns(by: str, *, priced: bool) -> list[str]:
    of = ["run", "of", "started"] if by == "run" else []
    return [*of, "model", *COUNTS, *(f"saved_{name}" for name in COUNTS), *(["cost", "saved_cost"] if priced else [])]


def _checked(prices: object) -> Mapping[str, tuple[float, float]] | None:
    if prices is None or _usage.are_prices(prices):
        return cast("_usage.Prices | None", prices)
    raise ValueError(
        "durable.ledger(prices=...): give for each model what a million input and a million output tokens cost, such as "
        "{'gpt-5-mini': (0.25, 2.00)}"
    )


def _said(value: Any) -> str:
    return (
        f"{value:%Y-%m-%d %H:%M}" if isinstance(value, datetime) else f"{value:.4f}" if isinstance(value, float) else str(value)
    )
