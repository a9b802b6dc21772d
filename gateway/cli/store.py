"""`patchbay store`: the database and the blobs themselves, without a gateway between."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.cli.failures import CommandFailed, ExitCode
from gateway.cli.options import AsJson, given
from gateway.cli.output import print_json, say, transfer_bar
from gateway.cli.serve import configure

if TYPE_CHECKING:
    from adapters_store.fsck import Finding, StoreCheck
    from gateway.config import StoreConfig

app = typer.Typer(no_args_is_help=True, help="Check the store: its database and its blobs.")


@app.callback()
def store() -> None:
    """Keeps `fsck` a command of its own while it is the only one."""


@app.command()
def fsck(
    config: Annotated[Path | None, typer.Option("--config", help="The YAML file that `serve` takes.")] = None,
    data_dir: Annotated[
        str | None, typer.Option(envvar="PATCHBAY_DATA_DIR", help="Holds the database and the blobs.")
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Remove what nothing names, and nothing else.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every blob, compare every row, and name what is wrong and what to do. Exits with 1 when there is damage.

    The gateway may run meanwhile. Leftovers, which killed processes leave and nothing names, are no damage.
    """
    check = _open(configure(config, store=given(data_dir=data_dir)).store)
    findings, num_bytes = _look(check, quiet=as_json)
    removed = [finding for finding in findings if repair and finding.is_leftover and check.repair(finding)]
    damaged = [finding for finding in findings if not finding.is_leftover]
    if as_json:
        found = [{**finding.to_json(), "removed": finding in removed} for finding in findings]
        print_json({"findings": found, "bytes_read": num_bytes, "num_damaged": len(damaged)})
    else:
        _print(findings, removed, num_bytes)
    raise typer.Exit(1 if damaged else 0)


def _open(config: StoreConfig) -> StoreCheck:
    from sqlalchemy import make_url

    from adapters_store.blobs import BlobStore
    from adapters_store.database import Database
    from adapters_store.fsck import StoreCheck

    url = make_url(config.database)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        hint = "--data-dir, --config or PATCHBAY_DATABASE_URL says where it is."
        raise CommandFailed(f"There is no database {url.database}.", ExitCode.REFUSED, hint)
    blobs = BlobStore(config.blobs, config.cache, config.cache_bytes)
    return StoreCheck(Database(config.database), blobs, config.staging)


def _look(check: StoreCheck, *, quiet: bool) -> tuple[list[Finding], int]:
    """All findings, and how many bytes were read for them."""
    num_bytes = 0
    with transfer_bar("Checking", quiet=quiet) as show:

        def on_bytes(count: int) -> None:
            nonlocal num_bytes
            num_bytes += count
            show(num_bytes, num_bytes)

        return list(check.findings(on_bytes)), num_bytes


def _print(findings: list[Finding], removed: list[Finding], num_bytes: int) -> None:
    for finding in findings:
        say(f"{finding.kind}: {finding.subject}")
        say(f"  {finding.problem}")
        say(f"  {'Removed.' if finding in removed else finding.advice}")
    count = f"{len(findings)} findings, {len(removed)} removed" if findings else "Nothing is wrong"
    say(f"{count}. {num_bytes:,} bytes read.")
