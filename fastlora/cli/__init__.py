"""The command line: ``fastlora`` and ``python -m fastlora``.

Every command imports what it needs when it runs, so ``--help`` is quick and ``doctor`` works on a
machine where torch's or transformers' installation is what is broken.
"""

from __future__ import annotations

import os
import sys

EXTRA = "fastlora's command line needs typer and rich: pip install 'fastlora[cli]'"


def prepare_environment() -> None:
    """Settings that libraries read once, when they are imported; what the user has set stays."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are local files, never looked up
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' own bars among rich's
    # GNU OpenMP spins for milliseconds when a thread waits. Where cores are shared (a busy machine,
    # a container's CPU quota) that was seen to make a training step ten times slower; this many
    # turns were enough to keep the full speed where they are not.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 bad input, 128 + n stopped by signal n."""
    prepare_environment()
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        if sys.argv[1:2] == ["doctor"]:  # the one command that must work on a broken installation
            from .doctor import doctor_command

            doctor_command()  # exits
        print(f"error: {EXTRA}", file=sys.stderr)
        sys.exit(2)
    app()
