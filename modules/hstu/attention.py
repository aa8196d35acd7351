"""HSTU's pointwise attention over packed sequences with query tokens, and the registry of its backends.

    a_i = sum_j silu(alpha q_i . k_j + rab_ij) v_j / n_i        over the keys j that i sees

There is no softmax, so what a row gets is a plain sum over keys: a query's own key is added on its own, and
blocks of keys need no common normaliser. n_i is a constant or the number of keys that i sees, never anything
of the batch: a row's value does not depend on who shares it. rab_ij is one learned number for the distance in
positions and one for the distance in time (HSTU, section 3; shared by the heads, as published).

Who sees whom: a position sees its sequence up to itself, of that only the last `window` positions where there
is a window; the first `prefix` positions are context that see one another and that every one sees (the public
code lets context see the whole history, and so the future); a query sees what a position in its place would
see, and itself.

Backends: `eager` and `compiled` (`modules.pointwise_blocks`), `triton` (`modules.hstu_triton`).

Legend: T history positions, Q queries, S = T + Q packed rows, H heads, D and V widths of a head's keys and values.
"""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hllm_torchrec.modules.encoders.base import PackedRows
from hllm_torchrec.modules.hstu import triton_backend
from hllm_torchrec.modules.hstu.blocks import plan_blocks
from hllm_torchrec.modules.hstu.eager import EAGER, InnerFunctions, blockwise
from hllm_torchrec.modules.hstu.layout import AttentionRules, Layout, RelativeBias, jagged_layout

Attention = Callable[[Tensor, Tensor, Tensor, Layout, RelativeBias | None], Tensor]
"""(q [S, H, D], k [S, H, D], v [S, H, V], layout, bias) -> [S, H, V]."""


@dataclass(frozen=True)
class HSTUBackend:
    """A way to compute the attention; `unavailable_reason` says why it cannot run on a device, or None; `plan` makes
    what it
    needs to know of a batch, once for all layers."""

    attend: Attention
    unavailable_reason: Callable[[torch.device], str | None]
    plan: Callable[[PackedRows, AttentionRules], Layout] = plan_blocks


@cache
def _compiled_inner() -> InnerFunctions:
    return InnerFunctions(torch.compile(EAGER.weights, dynamic=True), torch.compile(EAGER.gradients, dynamic=True))


def _compiled(q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: RelativeBias | None) -> Tensor:
    return blockwise(q, k, v, layout, bias, _compiled_inner())


def _no_compiler(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile needs triton on CUDA, not installed"
    found = any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))
    return None if found else "torch.compile needs a C++ compiler on the CPU, and none is on the PATH"


HSTU_BACKENDS: dict[str, HSTUBackend] = {
    "eager": HSTUBackend(blockwise, lambda device: None),
    "compiled": HSTUBackend(_compiled, _no_compiler),
    "triton": HSTUBackend(triton_backend.attend, triton_backend.unavailable_reason, jagged_layout),
}
"""The registry: add an entry to make a name usable in `user.shape.backend`."""


def known_backend(name: str) -> str:
    """The name, if there is such a backend, or it is "auto".

    Raises:
        ValueError: there is none.
    """
    if name != "auto" and name not in HSTU_BACKENDS:
        raise ValueError(
            f"user.shape.backend: {name!r}: no such attention backend; there are {['auto', *sorted(HSTU_BACKENDS)]}"
        )
    return name


def choose_hstu_backend(name: str, device: torch.device) -> tuple[HSTUBackend, str]:
    """The backend of that name, and in words which it is and why; "auto" is triton where there is CUDA, else eager.

    Raises:
        ValueError: it is unknown, or cannot run on this device; no other runs in its place.
    """
    if name == "auto":
        problem = triton_backend.unavailable_reason(device) if device.type == "cuda" else "it needs CUDA"
        chosen = "triton" if problem is None else "eager"
        return HSTU_BACKENDS[chosen], f"{chosen}: " + (
            "the first choice here" if problem is None else f"triton: {problem}"
        )
    backend = HSTU_BACKENDS[known_backend(name)]
    missing = backend.unavailable_reason(device)
    if missing is not None:
        raise ValueError(f"user.shape.backend: {name!r}: cannot run on {device.type}: {missing}; choose 'eager'")
    return backend, f"{name}: asked for"


def plan_layout(rows: PackedRows, rules: AttentionRules, backend: str) -> Layout:
    """What the backend needs to know of a batch.

    Raises:
        ValueError: as `choose_backend`.
    """
    return choose_hstu_backend(backend, rows.positions.device)[0].plan(rows, rules)


def pointwise_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: RelativeBias | None, backend: str
) -> Tensor:
    """a [S, H, V] of q [S, H, D], k [S, H, D], v [S, H, V] by the backend named, for which the layout was planned.

    Raises:
        ValueError: as `choose_backend`.
    """
    return choose_hstu_backend(backend, q.device)[0].attend(q, k, v, layout, bias)
