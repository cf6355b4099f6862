"""The command line: ``fastlora`` and ``python -m fastlora``.

Every command imports what it needs when it runs, so ``--help`` is quick and ``doctor`` works on a machine where torch's
or transformers' installation is what is broken.
"""

from __future__ import annotations

import os
import sys

EXTRA = "fastlora's command line needs typer and rich: pip install 'fastlora[cli]'"


def prepare_environment() -> None:
    """Settings that libraries read once, when they are imported; what the user has set stays."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are local; no hub client may look elsewhere
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' own bars among rich's
    # OpenMP threads that spin while they wait cost a training step up to tenfold where cores are shared (a busy
    # machine, a container's CPU quota); where they are not, sleeping costs nothing measurable.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Entry point of both spellings. Exit codes: 0 done, 1 the run failed, 2 bad input, 128 + n stopped by signal n."""
    prepare_environment()
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        if sys.argv[1:2] == ["doctor"]:  # the one command that must work on a broken installation
            from .doctor import doctor_command

            doctor_command()  # exits
        print(f"error: {EXTRA}", file=sys.stderr)
        sys.exit(2)
    app()
