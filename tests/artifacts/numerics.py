"""Settings under which numbers depend on the processor as little as possible, and a probe of what still differs.

The artifacts were computed under `SETTINGS`. Where `probe()` gives the bits that it gave then, and the packages are of
the same versions, the library must give the same bits, too; elsewhere only numbers within a tolerance.
"""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any

SETTINGS = {
    "ATEN_CPU_CAPABILITY": "default",  # torch's own kernels without AVX
    "CUDA_VISIBLE_DEVICES": "",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "HF_HUB_OFFLINE": "1",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_NUM_THREADS": "1",
    "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Of the environment, before torch is imported."""

PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "transformers", "peft", "numpy", "pyarrow")
"""Whose versions may change bits."""


def versions() -> dict[str, str]:
    """Package -> its version without the build (+cpu), of those that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name).partition("+")[0]
    return found


def probe() -> dict[str, list[str]]:
    """Kind of operation -> `float.hex()` of sums of what it gives: those kinds that the artifacts go through."""
    return {name: [float(x).hex() for x in numbers] for name, numbers in _operations()}


def _operations() -> Iterator[tuple[str, list[float]]]:
    import torch
    from torch.nn import functional

    def sums(*tensors: Any) -> list[float]:
        """Of products with fixed weights in double precision, one multiplication and addition after the other."""
        found = []
        for tensor in tensors:
            total = 0.0
            for place, value in enumerate(tensor.detach().flatten().tolist()):
                total += value * (1 + place % 7)
            found.append(total)
        return found

    def numbers(*shape: int) -> torch.Tensor:
        """Without a random generator, whose transcendental functions would be part of the question."""
        count = torch.Size(shape).numel()
        return ((torch.arange(count, dtype=torch.float64) * 37 % 101 - 50) / 29).float().reshape(shape)

    x, w = numbers(33, 24), numbers(40, 24)
    yield "generator", sums(torch.rand(9, generator=_seeded()), torch.randn(40, generator=_seeded()))
    yield "matmul", sums(functional.linear(x, w), x @ x.T, torch.bmm(x.reshape(3, 11, 24), w[:24].expand(3, 24, 24)))
    yield "pointwise", sums(x.exp(), x.sigmoid(), functional.silu(x), functional.gelu(x), x.abs().log1p(), x.rsqrt())
    yield "trigonometric", sums(x.sin(), x.cos())
    yield "norms", sums(functional.layer_norm(x, (24,)), functional.rms_norm(x, (24,)), functional.normalize(x))
    yield "softmax", sums(x.softmax(-1), x.log_softmax(-1), x.logsumexp(-1))
    yield "losses", sums(functional.binary_cross_entropy_with_logits(x[:, 0], (x[:, 1] > 0).float(), reduction="none"))
    yield "sums", sums(x.sum(), x.double().sum(0), x.mean(-1), x.cumsum(0), x.norm())
    q = numbers(2, 2, 17, 12)
    yield "attention", sums(functional.scaled_dot_product_attention(q, q + 1, q - 1, is_causal=True))
    yield "scatter", sums(torch.zeros(5, 24).index_add(0, torch.arange(33) % 5, x))
    yield "adam", sums(*_adam(x, w))
    yield "table", sums(*_table(numbers(30, 16)))
    yield "numpy", _numpy(x.double().numpy())


def _seeded() -> Any:
    import torch

    return torch.Generator().manual_seed(7)


def _adam(x: Any, w: Any) -> list[Any]:
    """Weights and gradients of a layer after two steps."""
    import torch

    weight = w.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        torch.tanh(x @ weight.T).square().sum().backward()
        optimizer.step()
    return [weight, weight.grad]


def _table(rows: Any) -> list[Any]:
    """A table of FBGEMM's after two steps of row-wise Adagrad in the backward pass, and what it returns then."""
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(*rows.shape, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.1,
    )
    with torch.no_grad():
        table.split_embedding_weights()[0].copy_(rows)
    indices, offsets = torch.arange(40) * 7 % 30, torch.arange(0, 41, 4)
    for _ in range(2):
        table(indices, offsets).square().sum().backward()
    return [table(indices, offsets), table.split_embedding_weights()[0]]


def _numpy(x: Any) -> list[float]:
    import numpy as np

    single = x.astype(np.float32)
    found = [
        np.logaddexp(0, x),
        np.exp(x),
        np.log1p(abs(x)),
        np.exp(single),
        x @ x.T,
        x.ravel() @ x.ravel(),
        x.var(0),
        single.mean(0),
    ]
    return [float(array.sum()) for array in found]
