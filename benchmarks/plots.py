"""Draw docs/plots/*.svg from the latest lines of benchmarks/results/; needs `pip install matplotlib`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks.engine import BANDWIDTH
from benchmarks.record import RESULTS
from benchmarks.step import PARTS

FOLDER = Path(__file__).parents[1] / "docs" / "plots"
Points = dict[str, dict[int, float]]  # a line's name -> x -> share of the floor


def latest(subject: str) -> dict[tuple[str, str, str], tuple[float, float | None]]:
    """(case, metric, system) -> (value, floor, if it has one) of the newest line."""
    lines = map(json.loads, (RESULTS / f"{subject}.jsonl").read_text().splitlines())
    return {(line["case"], line["metric"], line["system"]): (line["value"], line["floor"]) for line in lines}


def shares(case: str, name: Callable[[re.Match[str], str], str | None]) -> Points:
    """The share of its own floor of every case that the pattern fits; its group "x" is where it lies."""
    points: Points = {}
    for (text, metric, system), (value, floor) in latest("kernels").items():
        match = re.fullmatch(case, text)
        if match and floor and metric.startswith("us") and (line := name(match, system)):
            points.setdefault(line, {})[int(match["x"])] = floor / value
    return points


def draw(file: str, title: str, x_label: str, points: Points) -> None:
    """One plot: share of the byte floor against x."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for line, at in points.items():
        xs = sorted(at)
        axes.plot(xs, [at[x] for x in xs], marker="o", markersize=4, label=line)
    axes.set(xscale="log", xlabel=x_label, ylabel="share of the byte floor", ylim=(0, 1.05), title=title)
    ticks: Iterable[int] = sorted({x for at in points.values() for x in at})
    axes.set_xticks(list(ticks), [str(x) for x in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(FOLDER / file, metadata={"Date": None})
    plt.close(figure)


def draw_step() -> None:
    """Beside each other for each case: what the parts of a step take, and the floors of their bytes."""
    lines = latest("step")
    cases = list(dict.fromkeys(case for case, _, _ in lines))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    taken, least = [0.0] * len(cases), [0.0] * len(cases)
    for part, colour in zip([*PARTS, "idle"], [*plt.cm.tab10.colors[: len(PARTS)], "lightgrey"], strict=True):
        both = [lines.get((case, part, "patchbay"), (0.0, None)) for case in cases]
        values, floors = [value / 1e3 for value, _ in both], [(floor or 0.0) / 1e3 for _, floor in both]
        axes.bar([x - 0.16 for x in range(len(cases))], values, 0.4, bottom=taken, color=colour, label=part)
        axes.bar([x + 0.16 for x in range(len(cases))], floors, 0.16, bottom=least, color=colour, alpha=0.6)
        taken, least = ([a + b for a, b in zip(*pair, strict=True)] for pair in ((taken, values), (least, floors)))
    axes.set_xticks(range(len(cases)), [case.replace(" nf4", "").replace(" ", "\n") for case in cases])
    title = f"A decode step; narrow: its bytes at {BANDWIDTH / 1e12:.2f} TB/s"
    axes.set(xlabel="requests x adapters", ylabel="ms", title=title)
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(FOLDER / "step.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw all."""
    plt.rcParams["svg.hashsalt"] = "patchbay"  # the same figures give the same file
    FOLDER.mkdir(exist_ok=True)
    nf4 = shares(r"nf4_matmul M=(?P<x>\d+)", lambda match, system: system)
    draw("nf4.svg", "Four linears of a layer, NF4 and bf16 (each against its own bytes)", "rows", nf4)
    adapters = shares(r"adapters (\d+)x(?P<x>\d+) r16", lambda match, system: _rows(match[1], system))
    draw("adapters.svg", "Rank-16 adapters on all linears of a layer", "distinct adapters", adapters)
    vectors = shares(r"([a-z_, ]+) M=(?P<x>\d+)", lambda match, system: match[1] if system == "patchbay" else None)
    draw("vectors.svg", "Norm, rotary, gate, vectors by slot", "rows", vectors)
    attention = shares(r"decode attention (\d+)x(?P<x>\d+)", lambda match, system: system)
    draw("attention.svg", "Decode attention (64x256, 256x512, 64x2048, 16x8192)", "context", attention)
    draw_step()


def _rows(rows: str, system: str) -> str | None:
    how = {"patchbay": "added to the base's products", "sgmv": "shrinks and expands by themselves"}.get(system)
    return f"{rows} rows, {how}" if how and rows in ("64", "256") else None


if __name__ == "__main__":
    main()
