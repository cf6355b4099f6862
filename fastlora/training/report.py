"""What a run leaves behind: the JSON-lines log, the loss curve, JSON records."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from ..io.checkpoint import replace_file

Entry = dict[str, Any]
SMOOTHING_SHARE = 0.1  # the smoothed curve averages over about this share of the run


def json_line(values: Any) -> str:
    """Standard JSON: NaN and infinities, which it lacks, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(values))


def write_json(path: Path, values: Any) -> None:
    """One JSON record as a file, replaced whole."""
    replace_file(path, (json.dumps(json.loads(json_line(values)), indent=2) + "\n").encode())


class RunLog:
    """``log.jsonl``: one object a line, each with its ``step``; written as it happens.

    A full disk does not stop a run for its log: lines wait in memory for the next that fits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self._waiting = b""
        self._size = 0

    def resume(self, step: int) -> None:
        """Take over an earlier run's lines up to ``step``; what came later happens again."""
        self.entries += [entry for entry in read_log(self.path) if entry["step"] <= step]
        data = "".join(json_line(entry) + "\n" for entry in self.entries).encode()
        replace_file(self.path, data)
        self._size = len(data)

    def add(self, entry: Entry) -> None:
        """Append one entry."""
        self.entries.append(entry)
        self._waiting += (json_line(entry) + "\n").encode()
        try:
            with self.path.open("ab") as file:
                file.truncate(self._size)  # drops the half of a line that a full disk took
                file.write(self._waiting)
        except OSError:
            return
        self._size += len(self._waiting)
        self._waiting = b""

    def sync(self) -> None:
        """Flush to disk: a checkpoint must never be newer than its log."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def read_log(path: Path) -> list[Entry]:
    """The entries of a run's log, none where there is no log."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the line that a kill cut short
            entries.append(json.loads(line))
    return entries


def smooth(values: list[float], share: float = SMOOTHING_SHARE) -> list[float]:
    """Exponential moving average over about ``share`` of the values, corrected for its start."""
    keep = 1.0 - 1.0 / max(1.0, share * len(values))
    total = weight = 0.0
    result = []
    for value in values:
        total = keep * total + (1.0 - keep) * value
        weight = keep * weight + (1.0 - keep)
        result.append(total / weight)
    return result


def plot_curve(entries: list[Entry], path: Path, title: str) -> None:
    """Training loss, its smoothed course, and the held-out points, as a PNG. Needs no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    train = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training loss")
        axes.plot(
            steps,
            smooth(list(losses)),
            color="tab:blue",
            linewidth=2,
            label="training loss, smoothed",
        )
    evaluated = False
    for key, colour, label in (
        ("eval_loss", "tab:orange", "held-out loss"),
        ("watch_loss", "tab:green", "watched loss (general text)"),
    ):
        points = [(e["step"], e[key]) for e in entries if e.get(key) is not None]
        if not points:
            continue
        evaluated = True
        axes.plot(*zip(*points, strict=True), "o--", color=colour, label=label)
        for step, loss in points:
            axes.annotate(
                f"ppl {math.exp(min(loss, 700.0)):.4g}",
                (step, loss),
                textcoords="offset points",
                xytext=(0, 6),
                ha="center",
                fontsize=8,
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per token (nats)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if train or evaluated:
        axes.legend()
    _write_png(figure, path)


def plot_comparison(logs: dict[str, list[Entry]], path: Path) -> None:
    """Runs of several methods in one picture: smoothed training loss and held-out loss, and beside them the watched loss."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = colormaps["tab10" if len(logs) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    watched = any(entry.get("watch_loss") is not None for log in logs.values() for entry in log)
    figure = Figure(figsize=(12 if watched else 8, 4.5), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2 if watched else 1, squeeze=False)[0]
    keys = ("eval_loss", "watch_loss")
    titles = ("task: held-out loss, and training loss smoothed", "general text (--watch)")
    for axes, key, title in zip(panels, keys, titles, strict=False):
        for colour, (method, log) in zip(colours, logs.items(), strict=False):
            train = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
            if key == "eval_loss" and train:
                steps, losses = zip(*train, strict=True)
                axes.plot(steps, smooth(list(losses)), color=colour, alpha=0.4)
            points = [(entry["step"], entry[key]) for entry in log if entry.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o--", color=colour, label=method)
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss per token (nats)")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small", ncols=1 + len(logs) // 8)
    _write_png(figure, path)


def _write_png(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    building = path.with_name(f".{path.name}.building.png")
    try:
        FigureCanvasAgg(figure).print_png(building)
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)
