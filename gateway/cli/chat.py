"""`patchbay chat`: talk to the base or to an adapter."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from gateway.cli.options import DEFAULT_URL, ApiKey, AsJson, Timeout, Url, connect, given
from gateway.cli.output import print_json
from gateway.client import GatewayClient

Message = dict[str, str]


def chat(
    model: Annotated[
        str | None, typer.Argument(help="An adapter, tenant/name; without it, the base.", show_default=False)
    ] = None,
    message: Annotated[str | None, typer.Argument(help="One message; without it, a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens of an answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout: Timeout = 120.0,
    as_json: AsJson = False,
) -> None:
    """Chat with a model: one MESSAGE, the text on stdin, or (in a terminal) a conversation until Ctrl-D.

    With --json, prints the whole response object of each answer instead of streaming its text.
    """
    fields = given(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    messages = [{"role": "system", "content": system}] if system else []
    with connect(url, api_key, timeout) as client:
        name = model or client.base_model()
        if message is None and sys.stdin.isatty():
            _converse(client, name, messages, fields, as_json)
        else:
            text = sys.stdin.read() if message is None else message
            _answer(client, name, [*messages, {"role": "user", "content": text}], fields, as_json)


def _converse(client: GatewayClient, model: str, messages: list[Message], fields: Any, as_json: bool) -> None:
    while True:
        typer.echo("> ", err=True, nl=False)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            messages.append({"role": "user", "content": line.strip()})
            answer = _answer(client, model, messages, fields, as_json)
            messages.append({"role": "assistant", "content": answer})


def _answer(client: GatewayClient, model: str, messages: list[Message], fields: Any, as_json: bool) -> str:
    if as_json:
        response = client.chat(model, messages, **fields)
        print_json(response)
        return str(response["choices"][0]["message"]["content"])
    pieces = []
    for piece in client.chat_stream(model, messages, **fields):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    return "".join(pieces)
