"""Times of the kernels on one GPU, at the shapes of Llama-3.1-8B.

    python -m benchmarks.kernels [--device cuda] [--only nf4,adapters,vectors,attention]

Prints a table, and appends one JSON line a figure to benchmarks/results/kernels.jsonl. Peers that are installed
(bitsandbytes, FlashInfer) are measured in the same run.
"""

from __future__ import annotations

import argparse
from importlib import import_module

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernels.timing import bandwidth
from benchmarks.record import recorded

SUBJECTS = ("nf4", "adapters", "vectors", "attention")


def main() -> None:
    """Measure, record and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--only", default=",".join(SUBJECTS), help="which of them, by commas")
    only = parser.parse_args().only.split(",")
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth() / 1e12:.2f} TB/s, read and written")
    for subject in only:
        import_module(f"benchmarks.kernels.{subject}").run()
        torch.cuda.empty_cache()
    _print_table()


def _print_table() -> None:
    table = Table("case", "metric", "system", "value", "floor", "target")
    for line in recorded():
        row = [line[name] for name in ("case", "metric", "system", "value", "floor", "target")]
        table.add_row(
            *("" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
