"""HSTU's pointwise attention over packed sequences with query tokens, and the registry of its backends.

    a_i = sum_j silu(alpha q_i . k_j + rab_ij) v_j / n_i        over the keys j that i sees

There is no softmax, so the output of a row is a plain sum over keys: a query's own key is added separately, and
blocks of keys need no common normalizer. n_i is a constant or the number of keys that i sees, and never depends on
the batch: the same row has the same value in every batch. rab_ij is the sum of a learned number for the distance in
positions and one for the distance in time (HSTU, section 3; shared by the heads, as published).

Mask: a position sees the positions of its sequence up to itself, with a window only the last `window` of them. The
first `prefix` positions are context: they see one another, and every position sees them. (In the public code, and with
`prefix_mask` "history", context sees the complete history, and so the future.) A query sees the positions before it,
with the same window and context, and itself.

Backends: `eager` and `compiled` (`modules/hstu/eager.py`), `triton` (`modules/hstu/triton_backend.py`).

Legend: T history positions, Q queries, S = T + Q packed rows, H heads, D and V widths of a head's keys and values.
"""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.modules.encoders.base import PackedRows
from hllm_torchrec.modules.hstu import triton_backend
from hllm_torchrec.modules.hstu.blocks import plan_blocks
from hllm_torchrec.modules.hstu.eager import EAGER, InnerFunctions, blockwise
from hllm_torchrec.modules.hstu.layout import AttentionRules, Layout, RelativeBias, jagged_layout

Attention = Callable[[Tensor, Tensor, Tensor, Layout, RelativeBias | None], Tensor]
"""(q [S, H, D], k [S, H, D], v [S, H, V], layout, bias) -> [S, H, V]."""


@dataclass(frozen=True)
class HSTUBackend:
    """An implementation of the attention.

    unavailable_reason: device -> why it cannot run there, or None. plan: builds the layout of a batch that `attend`
    needs, once for all layers.
    """

    attend: Attention
    unavailable_reason: Callable[[torch.device], str | None]
    plan: Callable[[PackedRows, AttentionRules], Layout] = plan_blocks


@cache
def _compiled_inner() -> InnerFunctions:
    # dynamic: chunk shapes differ from batch to batch, and static ones would compile a kernel for each.
    return InnerFunctions(torch.compile(EAGER.weights, dynamic=True), torch.compile(EAGER.gradients, dynamic=True))


def _compiled(q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: RelativeBias | None) -> Tensor:
    return blockwise(q, k, v, layout, bias, _compiled_inner())


def _no_compiler(device: torch.device) -> str | None:
    # torch.compile emits Triton kernels for CUDA, and C++ for the CPU.
    if device.type == "cuda":
        return (
            None
            if importlib.util.find_spec("triton")
            else "torch.compile needs triton on CUDA, and it is not installed"
        )
    found = any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))
    return None if found else "torch.compile needs a C++ compiler on the CPU, and none is on the PATH"


HSTU_BACKENDS: dict[str, HSTUBackend] = {
    "eager": HSTUBackend(blockwise, lambda device: None),
    "compiled": HSTUBackend(_compiled, _no_compiler),
    "triton": HSTUBackend(triton_backend.attend, triton_backend.unavailable_reason, jagged_layout),
}
"""The registry of backends. An entry added here can be named in `HSTUShape.backend`."""


def known_backend(name: str) -> str:
    """Return `name` if it is "auto" or a registered backend.

    Raises:
        ValueError: the name is unknown.
    """
    if name != "auto" and name not in HSTU_BACKENDS:
        raise ArgumentError(
            f"backend: {name!r}: no such attention backend; there are {['auto', *sorted(HSTU_BACKENDS)]}"
        )
    return name


def choose_hstu_backend(name: str, device: torch.device) -> tuple[HSTUBackend, str]:
    """Return the backend of that name and, for the log, the reason for the choice.

    "auto" is triton on CUDA where it can run, else eager.

    Raises:
        ValueError: the name is unknown, or the backend cannot run on this device (there is no fallback).
    """
    if name == "auto":
        problem = triton_backend.unavailable_reason(device) if device.type == "cuda" else "it needs CUDA"
        if problem is None:
            return HSTU_BACKENDS["triton"], "triton: the default on CUDA"
        return HSTU_BACKENDS["eager"], f"eager, because triton cannot run here: {problem}"
    backend = HSTU_BACKENDS[known_backend(name)]
    missing = backend.unavailable_reason(device)
    if missing is not None:
        raise ArgumentError(f"backend: {name!r}: cannot run on {device.type}: {missing}; choose 'eager'")
    return backend, f"{name}: asked for"


def plan_layout(rows: PackedRows, rules: AttentionRules, backend: str) -> Layout:
    """Build the layout of a batch in the form that the backend needs.

    Raises:
        ValueError: as `choose_hstu_backend`.
    """
    return choose_hstu_backend(backend, rows.positions.device)[0].plan(rows, rules)


def pointwise_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: RelativeBias | None, backend: str
) -> Tensor:
    """Compute a [S, H, V] of q [S, H, D], k [S, H, D], v [S, H, V]; the layout was planned for the same backend.

    Raises:
        ValueError: as `choose_hstu_backend`.
    """
    return choose_hstu_backend(backend, q.device)[0].attend(q, k, v, layout, bias)
