"""The command tree. Modules that need torch or Ray are imported by the commands that use them."""

from __future__ import annotations

from importlib.metadata import version as installed_version

import typer

from gateway.cli import adapters, chat, finetune, keys, store, tenants
from gateway.cli.demo import demo
from gateway.cli.options import AsJson
from gateway.cli.output import print_json, say
from gateway.cli.serve import serve

app = typer.Typer(
    name="patchbay",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve many tenants' adapters in one batch on one quantized base model.",
    epilog="Exit codes: 0 done, 1 unexpected (of `store fsck`: damage), 2 usage, 3 refused, 4 key missing or wrong, "
    "5 not found, 6 unavailable or too slow, 7 ran without success, 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(demo)
app.add_typer(tenants.app, name="tenant")
app.add_typer(keys.app, name="key")
app.add_typer(adapters.app, name="adapter")
app.add_typer(finetune.app, name="finetune")
app.add_typer(store.app, name="store")
app.command()(chat.chat)


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    number = installed_version("patchbay")
    if as_json:
        print_json({"version": number})
    else:
        say(f"patchbay {number}")
