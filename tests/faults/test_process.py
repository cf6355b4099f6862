"""Importing, forking and threads. (Backward in a child of a process that ran one is refused by torch itself.)"""

from __future__ import annotations

import threading

import pytest
import torch

import fastlora
from tests.faults.common import operands, run_python, step

EVERYTHING = "[getattr(fastlora, name) for name in fastlora.__all__]"


def test_the_whole_api_and_a_step_start_no_cuda_and_no_compiler():
    """``torch.utils.cpp_extension`` looks for CUDA when imported, and so breaks every fork after it."""
    program = (
        "import sys, torch, fastlora\n"
        f"{EVERYTHING}\n"
        "import fastlora.triton, fastlora.ops.selftest\n"
        "net = torch.nn.Sequential(torch.nn.Linear(8, 6))\n"
        "model = fastlora.get_peft_model(net, fastlora.LoraConfig(r=2, target_modules=['0'], lora_dropout=0.1))\n"
        "model(torch.randn(3, 8)).sum().backward()\n"
        "print('torch.utils.cpp_extension' in sys.modules, torch.cuda.is_initialized())\n"
    )
    assert run_python(program) == "False False"


STEP = """
import os, torch, fastlora
from tests.faults.common import assert_right, operands
torch.set_num_threads(1)
def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def test_fork_after_use_on_the_cpu():
    """Before, after and beside: what a data loader's workers do."""
    program = STEP + (
        "work = lambda: assert_right(*operands())\n"
        "print(child(work))\n"
        "fastlora.lora_linear(*operands())\n"  # no backward: torch itself forbids it before a fork
        "print(child(work), child(lambda: child(work)))\n"
        "work()\n"
    )
    assert run_python(program).split() == ["0", "0", "0"]


def test_data_loader_workers_may_call_the_ops():
    program = (
        "import torch, fastlora\n"
        "from tests.faults.common import operands, step\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, i): return step(*operands(), dropout_p=0.1)[0]\n"
        "fastlora.lora_linear(*operands(), dropout_p=0.1)\n"
        "loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context='fork')\n"
        "batches = list(loader)\n"
        "print(len(batches), not torch.equal(batches[0], batches[1]))\n"
    )
    assert run_python(program) == "4 True"


def test_many_threads_on_the_cpu():
    """Every result is its own, and no launch is lost from the count."""
    problems = [operands(m=8 + i) for i in range(6)]
    expected = [step(*tensors) for tensors in problems]
    fastlora.reset_launches()
    failures, start = [], threading.Barrier(6)

    def work(i):
        start.wait()
        for _ in range(20):
            if not all(map(torch.equal, step(*problems[i]), expected[i])):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert {op: n for (op, _), n in fastlora.launches().items()} == {
        "down": 240, "gemm": 240, "wgrad": 120,
    }  # fmt: skip


def test_the_backend_choice_reaches_threads_that_run_backward(strict_backend, device):
    """autograd runs backward in threads of its own on a GPU; a choice kept per thread would be lost there."""
    x, w, a, b = (t.requires_grad_(i != 1) for i, t in enumerate(operands(device=device)))
    y = fastlora.lora_linear(x, w, a, b)
    fastlora.reset_launches()
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert x.grad is not None
    assert {backend for _, backend in fastlora.launches()} == {strict_backend}


# ---- on a GPU ---------------------------------------------------------------------------------------------

USE_CUDA = (
    "import fastlora.triton\n"
    f"{EVERYTHING}\n"
    "fastlora.lora_linear(*operands())\n"
    "def work():\n"
    "    with fastlora.backend('triton', strict=True):\n"
    "        assert_right(*operands(300, 256, 264, 16, torch.bfloat16, 'cuda'))\n"
    "    assert {b for _, b in fastlora.launches()} == {'triton', 'torch'}\n"
)


@pytest.mark.gpu
def test_import_then_fork_then_cuda_in_the_child():
    program = STEP + USE_CUDA + "print(child(work), child(work))\nwork()\nprint('parent')\n"
    assert run_python(program, timeout=300).split() == ["0", "0", "parent"]


@pytest.mark.gpu
def test_a_cpu_worker_forked_from_a_process_that_uses_cuda():
    program = (
        STEP
        + USE_CUDA
        + "work()\nprint(child(lambda: fastlora.lora_linear(*operands())))\nwork()\n"
    )
    assert run_python(program, timeout=300) == "0"


@pytest.mark.gpu
def test_many_threads_compile_and_launch_at_once():
    """Every thread meets kernels that none has compiled yet (their widths are used nowhere else)."""
    program = STEP + (
        "import threading\n"
        "problems = [operands(40 + i, 80 + 16 * i, 48, 8, torch.bfloat16, 'cuda') for i in range(8)]\n"
        "failures, start = [], threading.Barrier(8)\n"
        "def work(i):\n"
        "    start.wait()\n"
        "    try:\n"
        "        for _ in range(5): assert_right(*problems[i])\n"
        "    except BaseException as error: failures.append(error)\n"
        "with fastlora.backend('triton', strict=True):\n"
        "    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]\n"
        "    [t.start() for t in threads], [t.join() for t in threads]\n"
        "print(failures, {b for _, b in fastlora.launches()})\n"
    )
    assert run_python(program, timeout=300) == "[] {'triton'}"
