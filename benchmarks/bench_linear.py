"""One LoRA linear against everything else: ``python -m benchmarks.bench_linear [--quick] [--cases RE] [--out DIR]``."""

from __future__ import annotations

import argparse
import functools
import re

from benchmarks.cases import LINEAR, LINEAR_CPU, LINEAR_QUICK
from benchmarks.options import add_common
from fastlora.testing.bench_report import print_table, save_all, save_json
from fastlora.testing.linear_bench import LinearBench
from fastlora.testing.providers import all_providers
from fastlora.testing.timing import Rule


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_linear", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cases, the same rule")
    parser.add_argument(
        "--cases", default="", metavar="REGEX", help="cases whose name it is found in"
    )
    parser.add_argument(
        "--providers", default="", metavar="REGEX", help="providers whose name it is found in"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=360.0,
        metavar="S",
        help="seconds after which no case starts",
    )
    add_common(parser)
    options = parser.parse_args(arguments)

    device = options.device
    listed = (LINEAR_QUICK if options.quick else LINEAR) if device.type == "cuda" else LINEAR_CPU
    cases = [case for case in listed if re.search(options.cases, case.name)]
    known = all_providers()
    chosen = {
        name: provider for name, provider in known.items() if re.search(options.providers, name)
    }
    if not cases or not chosen:
        parser.error(
            f"nothing to run: --cases {options.cases!r} of {[case.name for case in listed]}, "
            f"--providers {options.providers!r} of {list(known)}"
        )
    if device.type != "cuda":
        print("no GPU: small cases, and the figures are this CPU's", flush=True)
    bench = LinearBench(
        device, chosen, Rule(rounds=options.rounds), progress=functools.partial(print, flush=True)
    )
    report = bench.run(cases, options.budget, save=lambda report: save_json(report, options.out))
    print_table(report)
    for path in save_all(report, options.out):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
