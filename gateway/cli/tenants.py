"""`patchbay tenant`: the tenants of a gateway (admin)."""

from __future__ import annotations

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

app = typer.Typer(no_args_is_help=True, help="Create and list tenants (admin).")


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="The tenant's id: the first part of its adapters' names.")],
    max_rank: Annotated[int | None, typer.Option(min=1, help="The highest LoRA rank it may use.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    data_dir: DataDir = Path(DEFAULT_DATA_DIR),
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Create a tenant."""
    with connect_as_admin(url, api_key, timeout, data_dir) as client:
        made = client.create_tenant(tenant, max_rank)
    if as_json:
        print_json(made)
    else:
        say(f"Created the tenant {made['id']}. Next: patchbay key create {made['id']}")


@app.command("list")
def list_tenants(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    data_dir: DataDir = Path(DEFAULT_DATA_DIR),
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """List the tenants."""
    with connect_as_admin(url, api_key, timeout, data_dir) as client:
        tenants = client.tenants()
    if as_json:
        print_json(tenants)
        return
    rows = [(one["id"], one.get("max_rank"), when(one.get("created_at"))) for one in tenants]
    print_table(("TENANT", "MAX RANK", "CREATED"), rows, "No tenants yet: patchbay tenant create NAME")
