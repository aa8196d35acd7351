"""The Triton backend of HSTU: run in Triton's interpreter, compiled for GPUs that are not here, refused elsewhere."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hllm_torchrec.modules.encoders.base import Queries, pack_rows
from hllm_torchrec.modules.hstu import triton_backend
from hllm_torchrec.modules.hstu.attention import choose_hstu_backend
from hllm_torchrec.modules.hstu.layout import AttentionRules, jagged_layout, time_bucket

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux alone")


@pytest.mark.slow
def test_in_the_interpreter_it_equals_the_eager_backend(root: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "tests/modules/hstu/interpreted_hstu_triton.py"],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]


def test_on_a_cpu_without_the_interpreter_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'triton': cannot run on cpu: it needs CUDA .*; choose 'eager'"):
        choose_hstu_backend("triton", CPU)
    triton_backend.unavailable_reason.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        choose_hstu_backend("triton", CPU)
    triton_backend.unavailable_reason.cache_clear()


def test_auto_is_eager_where_there_is_no_cuda_and_says_so() -> None:
    backend, words = choose_hstu_backend("auto", CPU)
    assert (
        backend is choose_hstu_backend("eager", CPU)[0]
        and words == "eager, because triton cannot run here: it needs CUDA"
    )


def test_bucket_edges_are_where_the_buckets_change() -> None:
    edges = triton_backend.bucket_edges(128, CPU)
    assert edges[:5].tolist() == [1, 2, 2, 3, 4] and edges[-1] > 10**16
    assert bool((time_bucket(edges, 128) >= torch.arange(129)).all())
    assert bool((time_bucket(edges[1:] - 1, 128) < torch.arange(1, 129)).all())


def launches(rules: AttentionRules, dtype: torch.dtype) -> list[triton_backend.Launch]:
    """All launches of a forward and a backward pass, heads of 64 and 48."""
    queries = Queries(torch.zeros(2, 1), torch.tensor([0, 1, 2]), torch.tensor([3, 1]), torch.tensor([5, 5]))
    rows = pack_rows(torch.tensor([0, 20, 25]), 25, torch.arange(25), queries)
    q, k, v = (torch.zeros(27, 2, width, dtype=dtype) for width in (64, 64, 48))
    tables: Any = [None, None] if rules.last_bucket is None else [torch.zeros(100), torch.zeros(129)]
    call = triton_backend.Call(q, k, v, *tables, jagged_layout(rows, rules))
    found = [*call.forward(v), *call.backward(v, q, k, v)]
    return found if rules.last_bucket is None else [*found, *call.backward_biases(v)[0]]


def compiled(launch: triton_backend.Launch, capability: int) -> Any:
    """The machine code of a launch for a GPU of that compute capability, by the compiler that Triton brings."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function, config = launch.kernel.fn, launch.kernel.configs[0]
    values = launch.arguments | config.kwargs
    constants = {p.name: values[p.name] for p in function.params if p.is_constexpr}
    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", int: "i32", float: "fp32"}
    types = {
        p.name: "constexpr" if p.is_constexpr else names[getattr(values[p.name], "dtype", type(values[p.name]))]
        for p in function.params
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return compile(ASTSource(function, types, constants), target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_here() -> None:
    window_and_prefix = AttentionRules(40, 5, None, 0.1, 128)
    found = {}
    for launch in launches(window_and_prefix, torch.bfloat16):
        if launch.arguments["HISTORY"]:
            found[launch.kernel.fn.__name__] = compiled(launch, 90).asm["cubin"]
    assert set(found) == {"forward", "backward_rows", "backward_keys", "backward_biases"}
    assert all(len(code) > 1000 for code in found.values())
