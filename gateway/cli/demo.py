"""`patchbay demo`: the whole system on this machine, in front of you."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.failures import CommandFailed, ExitCode
from gateway.cli.options import AsJson
from gateway.cli.output import print_json


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave it running, and its data in place.")] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where to keep its data; a temporary folder if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show all of it: upload two adapters, fine-tune a third, serve all three in one batch, check it.

    Exits 0 only if every check held, 7 otherwise.
    """
    if find_spec("openai") is None:
        hint = "Install it: pip install 'patchbay[demo]'."
        raise CommandFailed("The demo calls the gateway through the openai client too.", ExitCode.REFUSED, hint)
    from gateway.demo import run_demo

    checks = run_demo(keep=keep, data_dir=data_dir, quiet=as_json)
    failed = [check.name for check in checks if not check.held]
    if as_json:
        print_json({"checks": [vars(check) for check in checks], "passed": not failed})
    if failed:
        raise CommandFailed(f"The demo did not hold: {'; '.join(failed)}.", ExitCode.UNSUCCESSFUL)
