"""`patchbay key`: API keys (admin)."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.options import (
    DEFAULT_DATA_DIR,
    DEFAULT_URL,
    ApiKey,
    AsJson,
    DataDir,
    Timeout,
    Url,
    connect_as_admin,
)
from gateway.cli.output import print_json, print_table, say, when

app = typer.Typer(no_args_is_help=True, help="Create, list and revoke API keys (admin).")


class Role(StrEnum):
    """What a key may do."""

    tenant = "tenant"
    admin = "admin"


@app.command()
def create(
    tenant: Annotated[str | None, typer.Argument(help="The tenant that the key belongs to.")] = None,
    role: Annotated[Role, typer.Option(help="An admin's key manages tenants and keys.")] = Role.tenant,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    data_dir: DataDir = Path(DEFAULT_DATA_DIR),
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it: the only time that it shows."""
    if (tenant is None) == (role is Role.tenant):
        raise typer.BadParameter("name a tenant, or ask for an admin's key with --role admin (not both)")
    with connect_as_admin(url, api_key, timeout, data_dir) as client:
        made = client.create_key(tenant, role.value)
    if as_json:
        print_json(made)
    else:
        typer.echo("Keep this key: it does not show again.", err=True)
        say(made["key"])


@app.command("list")
def list_keys(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    data_dir: DataDir = Path(DEFAULT_DATA_DIR),
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """List the keys, without their secrets."""
    with connect_as_admin(url, api_key, timeout, data_dir) as client:
        keys = client.keys()
    if as_json:
        print_json(keys)
        return
    rows = [
        (one["id"], one.get("tenant"), one["role"], when(one.get("created_at")), when(one.get("revoked_at")))
        for one in keys
    ]
    print_table(("KEY ID", "TENANT", "ROLE", "CREATED", "REVOKED"), rows, "No keys yet.")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The id of the key, as `patchbay key list` shows it.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    data_dir: DataDir = Path(DEFAULT_DATA_DIR),
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Revoke a key, at once."""
    with connect_as_admin(url, api_key, timeout, data_dir) as client:
        answer = client.revoke_key(key_id)
    if as_json:
        print_json(answer)
    else:
        say(f"Revoked the key {key_id}.")
