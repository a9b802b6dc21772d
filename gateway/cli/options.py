"""The options that commands share, and the connection that they describe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from gateway.cli.failures import CommandFailed, ExitCode
from gateway.client import GatewayClient

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_DATA_DIR = "patchbay-data"
ADMIN_KEY_FILE = "admin.key"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

Url = Annotated[str, typer.Option("--url", envvar="PATCHBAY_URL", help="The gateway's HTTP address.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="PATCHBAY_API_KEY", help="The key to call with.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for an answer.")]
DataDir = Annotated[
    Path,
    typer.Option("--data-dir", envvar="PATCHBAY_DATA_DIR", help="The local gateway's data, with its admin key."),
]


def connect(url: str, api_key: str | None, timeout: float) -> GatewayClient:
    """A client with the key given. Raises `CommandFailed` when there is none."""
    if not api_key:
        raise CommandFailed(
            "This needs an API key, and none was given.",
            ExitCode.AUTHENTICATION,
            "Pass --api-key or set PATCHBAY_API_KEY; `patchbay key create TENANT` makes a key.",
        )
    return GatewayClient(url, api_key, timeout=timeout)


def connect_as_admin(url: str, api_key: str | None, timeout: float, data_dir: Path) -> GatewayClient:
    """A client with the key given, else with the admin key that a gateway on this machine wrote."""
    return GatewayClient(url, api_key or _local_admin_key(url, data_dir), timeout=timeout)


def _local_admin_key(url: str, data_dir: Path) -> str:
    path = data_dir / ADMIN_KEY_FILE
    hint = f"Pass --api-key or set PATCHBAY_API_KEY; the first admin key is in <data dir>/{ADMIN_KEY_FILE}."
    if urlsplit(url).hostname not in _LOOPBACK:
        raise CommandFailed("This needs an admin key, and none was given.", ExitCode.AUTHENTICATION, hint)
    try:
        return path.read_text().strip()
    except OSError as error:
        reason = f"This needs an admin key: none was given, and {path} cannot be read ({error.strerror})."
        raise CommandFailed(reason, ExitCode.AUTHENTICATION, hint) from error


def split_version(ref: str) -> tuple[str, int]:
    """ "tenant/name:3" -> ("tenant/name", 3). Raises `typer.BadParameter`."""
    name, _, version = ref.rpartition(":")
    if not name or not version.isdigit():
        raise typer.BadParameter(f"{ref!r} names no version; write it as tenant/name:3")
    return full_name(name), int(version)


def split_ref(ref: str) -> tuple[str, int | None]:
    """ "tenant/name:3" -> ("tenant/name", 3); "tenant/name" -> ("tenant/name", None). Raises `typer.BadParameter`."""
    return split_version(ref) if ":" in ref else (full_name(ref), None)


def full_name(name: str) -> str:
    """`name`, checked to be "tenant/name". Raises `typer.BadParameter`."""
    tenant, slash, rest = name.partition("/")
    if not (tenant and slash and rest) or "/" in rest or ":" in rest or "@" in rest:
        raise typer.BadParameter(f"{name!r} is not an adapter's name; write it as tenant/name")
    return name


def given(**fields: Any) -> dict[str, Any]:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}
