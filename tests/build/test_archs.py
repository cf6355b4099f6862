"""The architecture list of a build: both spellings, the words, what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
import archs  # noqa: E402

CUDA_13 = (13, 0)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("8.0 9.0a 12.0+PTX", ["80-real", "90a-real", "120-real", "120-virtual"]),
        ("80;90a-real,120-virtual", ["80-real", "90a-real", "120-virtual"]),
        ("9.0a 8.0, 80 8.0+PTX", ["80-real", "80-virtual", "90a-real"]),
        ("10.0f", ["100f-real"]),
        ("none", []),
    ],
)
def test_both_spellings_sorted_and_each_once(request_, expected):
    assert archs.parse(request_, CUDA_13) == expected


@pytest.mark.parametrize(
    "entry", ["9.7", "native", "sm_90", "8", "90b", "9.0a-real", "80+PTX", "10.1"]
)
def test_unknown_is_refused_with_the_known_list(entry):
    with pytest.raises(ValueError, match="unknown CUDA architecture") as error:
        archs.parse(f"8.0 {entry}", CUDA_13)
    assert entry in str(error.value)
    assert all(known in str(error.value) for known in archs.KNOWN)


@pytest.mark.parametrize("request_", ["", " ; ,"])
def test_an_empty_list_is_refused(request_):
    with pytest.raises(ValueError, match="no CUDA architecture"):
        archs.parse(request_, CUDA_13)


def test_too_new_for_this_nvcc_is_refused_by_name_and_left_out_of_the_defaults():
    with pytest.raises(ValueError, match=r"'12\.0' needs CUDA 12\.8 or newer; this nvcc is 12\.4"):
        archs.parse("8.0 12.0", (12, 4))
    assert archs.parse("default", (12, 4)) == [
        "75-real",
        "80-real",
        "86-real",
        "89-real",
        "90a-real",
    ]


def test_all_is_every_plain_and_chip_specific_architecture():
    every = archs.parse("all", CUDA_13)
    assert {"75-real", "90-real", "90a-real", "121a-real"} <= set(every)
    assert len(every) == sum(not known.endswith("f") for known in archs.KNOWN)


def test_default_ends_in_ptx_for_gpus_to_come():
    assert archs.parse("default", CUDA_13)[-1].endswith("-virtual")


def test_a_simt_file_is_compiled_for_everything_asked():
    asked = archs.parse("all", CUDA_13)
    assert archs.for_kind("simt", asked) == asked


def test_a_hopper_file_is_compiled_for_hopper_alone():
    assert archs.for_kind("sm90", archs.parse("default", CUDA_13)) == ["90a-real"]
    assert archs.for_kind("sm90", archs.parse("8.0 9.0 12.0", CUDA_13)) == []


def test_command_line_as_cmake_calls_it():
    command = [sys.executable, str(ROOT / "csrc" / "archs.py")]
    good = subprocess.run([*command, "8.0 9.0a", "13.0.88", "simt"], capture_output=True, text=True)
    assert (good.returncode, good.stdout) == (0, "80-real;90a-real\n")
    bad = subprocess.run([*command, "9.9", "13.0.88", "simt"], capture_output=True, text=True)
    assert bad.returncode == 1
    assert "unknown CUDA architecture '9.9'" in bad.stderr
