"""``compare(config, methods)``: the same data and steps by several methods, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import base
from .config import FinetuneConfig, option
from .energy import energy_counter
from .engine import engine_of
from .errors import FineTuneError, InputError, Interrupted, RunError
from .estimate import enter_on_meta
from .methods import METHOD_OPTIONS, METHODS, names
from .output import OutputDirectory, check_free, read_record
from .report import plot_comparison, read_log, write_json
from .run import finetune

if TYPE_CHECKING:
    from rich.console import Console

LORA_RATE = METHODS["lora"].learning_rate


@dataclass(frozen=True)
class Row:
    """One method's run. Bytes, seconds of a step (the median), joules of the whole run with its evaluations; perplexities as
    in ``Summary``. ``energy`` is None where ``no_energy`` says why."""

    method: str
    learning_rate: float
    trained_parameters: int
    total_parameters: int
    saved_bytes: int
    steps: int
    step_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    perplexity_before: float
    perplexity_after: float
    watched_perplexity_before: float | None
    watched_perplexity_after: float | None
    energy: float | None
    no_energy: str | None

    def cells(self) -> dict[str, str]:
        """A line of the table: heading -> text."""

        def change(before: float | None, after: float | None) -> str:
            return "-" if before is None or after is None else f"{before:.2f} -> {after:.2f}"

        return {
            "method": self.method,
            "trained": f"{self.trained_parameters / self.total_parameters:.2%}",
            "saved MiB": f"{self.saved_bytes / 2**20:,.1f}",
            "step s": f"{self.step_seconds:.3g}",
            "peak GiB": f"{self.peak_memory_bytes / 2**30:.2f}",
            "task perplexity": change(self.perplexity_before, self.perplexity_after),
            "general perplexity": change(
                self.watched_perplexity_before, self.watched_perplexity_after
            ),
            "energy kJ": "-" if self.energy is None else f"{self.energy / 1000:.2f}",
        }


class Comparison:
    """The output directory: a run's directory for every method, and what is made of them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.record = self.path / "compare.json"
        self.table = self.path / "compare.md"
        self.plot = self.path / "compare.png"

    def check_free(self, overwrite: bool) -> None:
        """Raise ``InputError`` unless a new comparison may start here."""
        check_free(self.path, self.record, overwrite, "comparison", "compare")

    def read(self) -> dict[str, Any]:
        """``compare.json``; ``InputError`` where there is none."""
        return read_record(self.record, {"config", "methods", "rows"}, "comparison", "compare")


def compare(
    config: FinetuneConfig,
    methods: Sequence[str] = ("lora", "qlora", "full"),
    learning_rates: Mapping[str, float] | None = None,
    console: Console | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> list[Row]:
    """Train by each of ``methods`` on the same data for the same steps, one after another, and report them side by side.

    Each run is ``finetune``'s, in a process of its own (so that its peak of memory is its own) and a directory of its own,
    ``config.output/<method>``. ``config.output`` gets compare.json, compare.md and compare.png, written anew after each run.

    Args:
        config: the run; ``method`` is not looked at, ``output`` is the directory of all. ``watch`` gives the general
            perplexity. Options of some methods (``r``) are for those of ``methods`` that have them. ``learning_rate`` is
            LoRA's; others take theirs in proportion. Documents are packed if every method can.
        methods: of ``METHODS``, in the order of the table.
        learning_rates: by method, where another one is wanted.
        console: its ``quiet`` is the runs' too.
        resume: continue a comparison: finished runs are kept, others go on from their checkpoints.
        overwrite: replace the comparison in ``config.output``.

    Raises:
        InputError: an option cannot be, for any of the methods; nothing was started.
        RunError: a run failed (``Interrupted``: was stopped); what is finished stays.
    """
    from rich.console import Console

    console = console or Console()
    out = Comparison(config.output)
    learning_rates = dict(learning_rates or {})
    configs = _configs(config, methods, learning_rates)
    facts = {
        "config": {**config.to_json(), "method": None},
        "methods": list(methods),
        "learning_rates": learning_rates,
    }
    rows: list[Row] = []
    if resume:
        saved = out.read()
        if all(saved.get(name) == facts[name] for name in ("config", "learning_rates")):
            done = {row["method"]: Row(**row) for row in saved["rows"]}
            rows = [done[method] for method in configs if method in done]
    else:
        out.check_free(overwrite)
    for each in configs.values():
        _check(each)
    _write(out, facts, rows)
    for method, each in configs.items():
        if any(row.method == method for row in rows):
            continue
        console.print(f"\n{method}", style="bold", markup=False)
        continued = resume and OutputDirectory(each.output).run.is_file()
        try:
            rows.append(_run_apart(each, continued, overwrite or resume, console.quiet))
        except Interrupted:
            raise
        except FineTuneError as error:
            raise type(error)(f"{method}: {error}") from error
        rows.sort(key=lambda row: list(configs).index(row.method))
        _write(out, facts, rows)
    return rows


def _configs(
    config: FinetuneConfig, methods: Sequence[str], learning_rates: Mapping[str, float]
) -> dict[str, FinetuneConfig]:
    """Each method's run; ``InputError`` for what cannot be compared."""
    if not methods:
        raise InputError(f"--methods is empty: give some of {names(METHODS)}")
    for i, method in enumerate(methods):
        if method not in METHODS:
            raise InputError(f"--methods {method!r} is not one of {names(METHODS)}")
        if method in methods[:i]:
            raise InputError(f"--methods names {method} twice")
    if config.max_minutes is not None:
        raise InputError("--max-minutes would give each method other steps; use --max-steps")
    if absent := [name for name in learning_rates if name not in methods]:
        raise InputError(f"--learning-rates: {absent[0]!r} is not one of --methods")
    options = {name for method in methods for name in METHODS[method].options}
    for name in METHOD_OPTIONS:
        if getattr(config, name) is not None and name not in options:
            raise InputError(f"{option(name)}: none of --methods has it; leave it out")
    packing = config.packing
    if packing is None:
        packing = not any("packing" in METHODS[method].refuses for method in methods)
    rate = LORA_RATE if config.learning_rate is None else config.learning_rate
    configs = {}
    for method in methods:
        kind = METHODS[method]
        own = kind.learning_rate / LORA_RATE * rate
        changes: dict[str, Any] = dict.fromkeys(options - kind.options.keys())
        changes |= {
            "method": method,
            "output": str(Path(config.output) / method),
            "packing": packing,
            "learning_rate": learning_rates.get(method, float(f"{own:.6g}")),
        }
        configs[method] = dataclasses.replace(config, **changes)
        configs[method].validate()
    return configs


def _check(config: FinetuneConfig) -> None:
    """What can be known of a run before the one ahead of it has taken its hours."""
    engine = engine_of(config)
    engine.check_base()
    _, gguf = base.locate(config.model)
    if gguf is None and base.quantization(config.model) is None:
        enter_on_meta(config, engine, torch.bfloat16)


def _write(out: Comparison, facts: dict[str, Any], rows: list[Row]) -> None:
    """Everything but the runs."""
    try:
        out.path.mkdir(parents=True, exist_ok=True)
        write_json(out.record, facts | {"rows": [dataclasses.asdict(row) for row in rows]})
        if not rows:
            for stale in (out.table, out.plot):
                stale.unlink(missing_ok=True)
            return
        out.table.write_text(markdown(rows, facts["config"]), encoding="utf-8")
        logs = {row.method: read_log(OutputDirectory(out.path / row.method).log) for row in rows}
        plot_comparison(logs, out.plot)
    except OSError as error:
        raise RunError(f"cannot write to --output {out.path}: {error.strerror}") from error


def markdown(rows: list[Row], config: dict[str, Any]) -> str:
    """The table and what it is of."""
    cells = [row.cells() for row in rows]
    lines = [list(cells[0]), ["---"] * len(cells[0]), *(list(line.values()) for line in cells)]
    steps = sorted({row.steps for row in rows})
    what = (
        f"{Path(config['model']).name} on {Path(config['data']).name}: {', '.join(map(str, steps))} steps of "
        f"{config['batch_size']} x {config['grad_accumulation']} blocks of {config['seq_length']} tokens. "
        f"Learning rates: {', '.join(f'{row.method} {row.learning_rate:g}' for row in rows)}."
    )
    return "\n".join(
        [
            "# Methods compared",
            "",
            what,
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            *notes(rows),
            "",
        ]
    )


def notes(rows: list[Row]) -> list[str]:
    """What the table's headings and gaps mean."""
    lines = ["Perplexities are before -> after training; a step's time is the median."]
    if any(row.watched_perplexity_after is None for row in rows):
        lines.append("No general perplexity: --watch FILE gives it.")
    lines += sorted({f"No energy: {row.no_energy}." for row in rows if row.no_energy})
    return lines


# ---- one run, in a process of its own ------------------------------------------------------------------------


def _run_apart(config: FinetuneConfig, resume: bool, overwrite: bool, quiet: bool) -> Row:
    """``_run`` in a new process. A signal that this one gets is passed on, once: the run saves and stops."""
    spawn = multiprocessing.get_context("spawn")
    receive, send = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_child, args=(send, config, resume, overwrite, quiet))
    process.start()
    send.close()
    with _passing_signals(process.pid), contextlib.closing(receive):
        try:
            kind, value = receive.recv()
        except EOFError:
            kind, value = "died", None
        process.join()
    if kind == "row":
        return Row(**value)
    if kind == "error":
        message, code = value
        if code >= 128:
            raise Interrupted(message, code - 128)
        raise (InputError if code == 2 else RunError)(message)
    raise RunError(
        f"the process of this run ended with exit code {process.exitcode}: "
        + ("out of memory?" if process.exitcode == -signal.SIGKILL else "see above")
    )


@contextlib.contextmanager
def _passing_signals(pid: int | None) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or pid is None:
        yield
        return

    def pass_on(number: int, _frame: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    previous = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _child(send: Any, config: FinetuneConfig, resume: bool, overwrite: bool, quiet: bool) -> None:
    with contextlib.suppress(OSError):
        os.setpgrp()  # a terminal's Ctrl-C comes by the parent alone, not twice
    try:
        send.send(("row", dataclasses.asdict(_run(config, resume, overwrite, quiet))))
    except FineTuneError as error:
        send.send(("error", (str(error), error.exit_code)))
    except KeyboardInterrupt:
        send.send(("error", ("stopped at once; what was saved before stays", 130)))


def _run(config: FinetuneConfig, resume: bool, overwrite: bool, quiet: bool) -> Row:
    from rich.console import Console

    energy = energy_counter(base.pick_device(config.device))
    begun = energy() if callable(energy) else 0.0
    summary = finetune(config, Console(quiet=quiet), resume, overwrite and not resume)
    used = energy() - begun if callable(energy) else None
    out = OutputDirectory(config.output)
    seconds = [entry["seconds"] for entry in read_log(out.log) if "loss" in entry]
    steps = [after - before for before, after in zip([0.0, *seconds], seconds, strict=False)]
    return Row(
        method=config.method,
        learning_rate=config.rate,
        trained_parameters=summary.trained_parameters,
        total_parameters=summary.total_parameters,
        saved_bytes=summary.saved_bytes,
        steps=summary.steps,
        step_seconds=statistics.median(steps),
        tokens_per_second=summary.tokens_per_second,
        peak_memory_bytes=summary.peak_memory_bytes,
        perplexity_before=summary.perplexity_before,
        perplexity_after=summary.perplexity_after,
        watched_perplexity_before=summary.watched_perplexity_before,
        watched_perplexity_after=summary.watched_perplexity_after,
        energy=used,
        no_energy=None if callable(energy) else energy,
    )
