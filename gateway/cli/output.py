"""What commands print: JSON or tables to stdout, notes and progress bars to stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

_NO_WIDTH: Final = 10_000


def print_json(value: Any) -> None:
    """One JSON document on one line of stdout, written at once."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def say(text: str) -> None:
    """A line for people, on stdout."""
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
    """A table on stdout, or the line `empty` when there are no rows."""
    if not rows:
        say(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # Nothing is cut: other commands are called with it. What a row is called by is not broken into lines either.
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width
        console.width = _NO_WIDTH
    console.print(table, markup=False)


def when(seconds: int | None) -> str:
    """Unix seconds as local time, or a dash."""
    if seconds is None:
        return "-"
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


@contextmanager
def transfer_bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on stderr; yields the function to call with (sent, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with _progress(*columns, quiet=quiet) as progress:
        task = progress.add_task(what, total=None)
        yield lambda sent, total: progress.update(task, completed=sent, total=total)


@contextmanager
def training_bar(what: str, *, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar of training steps on stderr; yields the function to call with a metrics event's data."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps  {task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with _progress(*columns, quiet=quiet) as progress:
        task = progress.add_task(what, total=1, figures="")

        def update(data: dict[str, Any]) -> None:
            figures = f"loss {data['train_loss']:.3f}  {data['tokens_per_second']:.0f} tokens/s"
            progress.update(task, completed=data["step"], total=data["total_steps"], figures=figures)

        yield update


def _progress(*columns: Any, quiet: bool) -> Progress:
    console = Console(stderr=True)
    # Without a terminal a bar would print one line for its end only: leave it out.
    return Progress(*columns, console=console, disable=quiet or not console.is_terminal)
