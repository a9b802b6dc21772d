"""The `patchbay` command. Its exit codes are those of `gateway.cli.failures.ExitCode`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave by `SystemExit` with its exit code.

    With --json an error goes to stdout as `{"error": ...}` too, so that stdout is JSON whatever happens.
    """
    from gateway.cli.app import app
    from gateway.cli.failures import describe, report

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(args=list(arguments), prog_name="patchbay")
    except Exception as error:
        report(describe(error), as_json="--json" in arguments)
