"""`patchbay adapter`: a tenant's adapters, their versions and aliases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gateway.cli.failures import CommandFailed, ExitCode
from gateway.cli.options import DEFAULT_URL, ApiKey, AsJson, Timeout, Url, connect, full_name, split_ref, split_version
from gateway.cli.output import print_json, print_table, say, transfer_bar, when
from gateway.client import InvalidInput

app = typer.Typer(no_args_is_help=True, help="Upload, test, download, list, alias, tag, roll back and delete adapters.")
Name = Annotated[str, typer.Argument(help="The adapter: tenant/name.")]
Tagged = Annotated[str, typer.Argument(help="The adapter or the version: tenant/name or tenant/name:3.")]


@app.command()
def upload(
    path: Annotated[Path, typer.Argument(help="A peft folder, or a .tar, .tar.gz, .tgz or .zip of one.")],
    name: Annotated[str, typer.Argument(help="The adapter: tenant/name, or name in the key's tenant.")],
    alias: Annotated[str, typer.Option(help="The alias to point at the new version.")] = "default",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
) -> None:
    """Upload a peft adapter as the next version of NAME, and point an alias at it."""
    with (
        connect(url, api_key, timeout) as client,
        transfer_bar(f"Uploading {name}", quiet=as_json) as on_progress,
    ):
        version = client.upload_adapter(name, path, alias, on_progress)
    if as_json:
        print_json(version)
    else:
        error = f", off by {version['import_error']:.2%}" if version["import_error"] else ""
        say(f"Published {version['ref']} (rank {version['rank']}{error}), named by @{alias}.")


@app.command("list")
def list_adapters(
    name: Annotated[str | None, typer.Argument(help="Only this adapter: tenant/name.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """List adapters, their versions and the aliases that name them."""
    with connect(url, api_key, timeout) as client:
        adapters = client.adapters() if name is None else [client.adapter(full_name(name))]
    if as_json:
        print_json(adapters)
        return
    rows = [row for adapter in adapters for row in _rows(adapter)]
    empty = "No adapters yet: patchbay adapter upload FOLDER NAME"
    print_table(("VERSION", "ALIASES", "TAGS", "RANK", "STATUS", "CREATED"), rows, empty)


@app.command()
def alias(
    name: Name,
    alias: Annotated[str, typer.Argument(help="The alias to set; `default` is what the bare name means.")],
    version: Annotated[int, typer.Argument(min=1, help="The version to point it at.")],
    canary: Annotated[
        int | None, typer.Option(min=1, help="A second version, for part of the alias's callers.")
    ] = None,
    percent: Annotated[int, typer.Option(min=1, max=100, help="The share of callers that get the canary.")] = 10,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Point an alias at a version. Running requests finish on the version that they began with.

    A canary that the alias had is dropped unless it is given again: without --canary this promotes or stops one.
    """
    split = (canary, percent) if canary is not None else None
    with connect(url, api_key, timeout) as client:
        adapter = client.set_alias(full_name(name), alias, version, split)
    _print_alias(adapter, name, alias, as_json)


@app.command()
def unalias(
    name: Name,
    alias: Annotated[str, typer.Argument(help="The alias to take away.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Take an alias away, with its canary. The version that it named stays, and can be deleted then."""
    with connect(url, api_key, timeout) as client:
        adapter = client.delete_alias(full_name(name), alias)
    if as_json:
        print_json(adapter)
    else:
        say(f"{name} has no @{alias} any more.")


@app.command()
def rollback(
    name: Name,
    alias: Annotated[str, typer.Option(help="The alias to point back.")] = "default",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Drop an alias's canary; without one, point it back at the version that it named before."""
    with connect(url, api_key, timeout) as client:
        adapter = client.rollback(full_name(name), alias)
    _print_alias(adapter, name, alias, as_json)


@app.command("test")
def run_self_test(
    version: Annotated[str, typer.Argument(help="The version to test: tenant/name:3.")],
    golden: Annotated[
        Path | None, typer.Option(help='A JSON file of golden prompts, [{"prompt": ..., "completion": ...}].')
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
) -> None:
    """Run a version's self-test again: one that is quarantined serves again if it passes, one that fails does not.

    Golden prompts are those of the option, else those of the upload. No alias is moved. Exits with 7 where it failed.
    """
    name, number = split_version(version)
    prompts = _golden(golden) if golden is not None else []
    with connect(url, api_key, timeout) as client:
        tested = client.test_version(name, number, prompts)
    passed = tested["report"]["passed"]
    if as_json:
        print_json(tested)
    elif passed:
        say(f"{version} passed and is ready.")
    if not passed:
        reason = f"{version} did not pass its self-test and is quarantined: {tested['report']['reason']}"
        raise CommandFailed(reason, ExitCode.UNSUCCESSFUL)


@app.command()
def download(
    version: Annotated[str, typer.Argument(help="The version: tenant/name:3.")],
    folder: Annotated[Path | None, typer.Argument(help="The peft folder to write.", show_default="./name-3")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
) -> None:
    """Download a version as a folder that PeftModel.from_pretrained loads."""
    name, number = split_version(version)
    target = folder or Path(f"{name.rpartition('/')[2]}-{number}")
    with connect(url, api_key, timeout) as client:
        client.download_adapter(name, number, target)
    if as_json:
        print_json({"ref": version, "folder": str(target)})
    else:
        say(f"Wrote {version} to {target}.")


@app.command()
def tag(
    ref: Tagged,
    key: Annotated[str, typer.Argument(help="The tag's key.")],
    value: Annotated[str, typer.Argument(help="Its value; it replaces the one that is there.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Tag an adapter or a version with a text."""
    name, version = split_ref(ref)
    with connect(url, api_key, timeout) as client:
        adapter = client.set_tag(name, key, value, version)
    if as_json:
        print_json(adapter)
    else:
        say(f"{ref} has {key}={value}.")


@app.command()
def untag(
    ref: Tagged,
    key: Annotated[str, typer.Argument(help="The tag's key.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Take a tag away from an adapter or a version."""
    name, version = split_ref(ref)
    with connect(url, api_key, timeout) as client:
        adapter = client.delete_tag(name, key, version)
    if as_json:
        print_json(adapter)
    else:
        say(f"{ref} has no {key} any more.")


@app.command()
def delete(
    version: Annotated[str, typer.Argument(help="The version to delete: tenant/name:3.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Delete a version that no alias names. Running requests finish on it."""
    name, number = split_version(version)
    with connect(url, api_key, timeout) as client:
        answer = client.delete_version(name, number)
    if as_json:
        print_json(answer)
    else:
        say(f"Deleted {version}.")


def _golden(path: Path) -> list[dict[str, str]]:
    """The prompts of the file; what is in them the gateway checks. Raises `InvalidInput`."""
    try:
        prompts = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(prompts, list):
        raise InvalidInput(f'{path} must hold a list of {{"prompt": ..., "completion": ...}}.')
    return prompts


def _rows(adapter: dict[str, Any]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for version in adapter["versions"]:
        names = sorted(name for name, number in adapter["aliases"].items() if number == version["version"])
        shares = [
            f"@{name}({canary['percent']}%)"
            for name, canary in sorted(adapter["canaries"].items())
            if canary["version"] == version["version"]
        ]
        aliases = " ".join([*(f"@{name}" for name in names), *shares])
        tags = " ".join(f"{key}={value}" for key, value in version["tags"].items())
        created = when(version["created_at"])
        rows.append((version["ref"], aliases, tags, version["rank"], version["status"], created))
    return rows


def _print_alias(adapter: dict[str, Any], name: str, alias: str, as_json: bool) -> None:
    if as_json:
        print_json(adapter)
    else:
        canary = adapter["canaries"].get(alias)
        split = f", and {name}:{canary['version']} for {canary['percent']} % of callers" if canary else ""
        say(f"{name}@{alias} is now {name}:{adapter['aliases'][alias]}{split}.")
