"""Registry of the kernels for the Item LLM's attention over packed texts, and the choice among them.

    buckets   length-sorted padded buckets, SDPA or plain products in each; every device and dtype
    varlen    torch.nn.attention.varlen; CUDA from compute capability 8.0, bfloat16 or float16
    flash     the flash-attn package (optional); as varlen, and supports dropout and capped scores
    flex      torch's FlexAttention with compiled block masks; CUDA, any dtype; only on request, never by "auto"

A User LLM's query tokens (`hllm_torchrec.modules.attention.packed`) always run in buckets, because no other kernel
supports queries that see a part of a sequence and themselves.

A variable-length kernel computes the attention to a shared prefix in the same call: the few key and value rows of the
prefix are repeated in front of each text's rows, and a causal mask aligned at the bottom right (the convention of
FlashAttention since 2.1) lets the text see all of them. Two calls merged by their log-sum-exp would save these copies,
but the kernels return no gradient of the log-sum-exp, so the merged gradient would be wrong.

Legend: n sequences, S packed rows, K key rows (with the copies of the prefix), H heads, G key-value heads, D width of a
head.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.modules.attention.text import ScoreLimits, TextLayout, WholeTextPlan, plan_buckets
from hllm_torchrec.modules.jagged import offsets_from_lengths


class Sequences(NamedTuple):
    """Packed sequences without padding; the first four fields are positional arguments of varlen and flash.

    cu_q and cu_k: int32 [n + 1], offsets of each sequence's queries and keys; longest_q and longest_k: largest number
    of queries and of keys in one sequence. causal: query i of a sequence with q queries and k keys sees the keys up to
    k - q + i. limits: window and softcap of the layer; a window's distances are measured from key k - q + i, too.
    """

    cu_q: Tensor
    cu_k: Tensor
    longest_q: int
    longest_k: int
    causal: bool
    limits: ScoreLimits = ScoreLimits()

    def window(self) -> tuple[int, int]:
        """(left, right) distances that a query sees, as FlashAttention counts them; -1: no limit."""
        reach = -1 if self.limits.window is None else self.limits.window - 1
        return reach, 0 if self.causal else reach


class VarlenKernel(Protocol):
    """Function that computes attention within each of the sequences."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scaling: float, dropout: float
    ) -> Tensor:
        """Compute query [S, H, D], key and value [K, G, D] -> [S, H, D]."""


@dataclass(frozen=True)
class AttentionBackend:
    """An entry of the registry.

    kernel: None for padded buckets. unavailable_reason: function (device, dtype of the matrix products) -> reason why
    the backend cannot run there, or None. has_softcap: whether it can cap scores.
    """

    name: str
    kernel: VarlenKernel | None
    unavailable_reason: Callable[[torch.device, torch.dtype], str | None]
    has_softcap: bool = False


@dataclass(frozen=True)
class BackendChoice:
    """A backend and, for the log, the reason for its choice."""

    backend: AttentionBackend
    reason: str

    def __str__(self) -> str:
        return f"{self.backend.name}: {self.reason}"


TEXT_BACKENDS: dict[str, AttentionBackend] = {}
"""Backends by name, in the order in which `choose_text_backend` tries them."""


def register_backend(backend: AttentionBackend) -> None:
    """Add a backend, or replace the one with its name."""
    TEXT_BACKENDS[backend.name] = backend


def choose_text_backend(name: str, device: torch.device, dtype: torch.dtype, softcap: bool = False) -> BackendChoice:
    """Return the backend called `name`, or for "auto" the first that can run.

    dtype: of the matrix products; softcap: whether the model caps its scores.

    Raises:
        ValueError: the name is unknown, or the backend cannot run on this device in this dtype or cannot cap scores.
    """
    if name != "auto" and name not in TEXT_BACKENDS:
        raise ArgumentError(f"attention: {name!r}: unknown; choose auto or one of {', '.join(TEXT_BACKENDS)}")
    passed: list[str] = []
    for tried in TEXT_BACKENDS if name == "auto" else [name]:
        # The reasons against earlier backends explain the choice of "auto" in the log.
        problem = TEXT_BACKENDS[tried].unavailable_reason(device, dtype)
        if problem is None and softcap and not TEXT_BACKENDS[tried].has_softcap:
            problem = "cannot cap scores, which the model needs"
        if problem is None:
            default = "asked for" if name != "auto" else f"the default on {torch.device(device).type}"
            return BackendChoice(TEXT_BACKENDS[tried], ", ".join(passed) or default)
        passed.append(f"{tried} {problem}")
    raise ArgumentError(f"attention: {', '.join(passed)}; choose auto, which takes what can run")


def plan_text(layout: TextLayout, backend: AttentionBackend, device: torch.device) -> WholeTextPlan:
    """Make the attention plan that every layer uses for a batch with this layout."""
    return plan_buckets(layout, device) if backend.kernel is None else plan_varlen(layout, backend.kernel, device)


@dataclass(frozen=True)
class VarlenPlan:
    """A `TextPlan` without padding; its sequences are the prefix (if any) and every text that is not empty.

    key_rows: [K] int64, the packed row of each key; None without a prefix, when the keys are the packed rows in order.
    """

    kernel: VarlenKernel
    sequences: Sequences
    key_rows: Tensor | None
    position_ids: Tensor

    @property
    def longest(self) -> int:
        """Largest number of keys that a row sees."""
        return self.sequences.longest_k

    def limited(self, limits: ScoreLimits) -> "VarlenPlan":
        """See `LimitedPlan`."""
        return replace(self, sequences=self.sequences._replace(limits=limits))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`."""
        return self._run(query, key, value, self.key_rows, self.sequences, scaling, dropout)

    def attend_last(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`."""
        rows, cu_k = self.key_rows, self.sequences.cu_k
        if rows is not None:  # the first sequence is the prefix
            rows, cu_k = rows[cu_k[1] :], cu_k[1:] - cu_k[1]
        # One query per sequence. It may see all keys of its text, so the kernel runs without a causal mask.
        cu_q = torch.arange(query.shape[0] + 1, device=query.device, dtype=torch.int32)
        last = Sequences(cu_q, cu_k, 1, self.longest, causal=False, limits=self.sequences.limits)
        return self._run(query, key, value, rows, last, scaling, dropout)

    def _run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Tensor | None,
        sequences: Sequences,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        """Run the kernel in value's dtype: rotary embeddings leave queries and keys in float32."""
        query, key = query.to(value.dtype), key.to(value.dtype)
        if rows is not None:
            key, value = key.index_select(0, rows), value.index_select(0, rows)
        return self.kernel(query.contiguous(), key.contiguous(), value.contiguous(), sequences, scaling, dropout)


def plan_varlen(layout: TextLayout, kernel: VarlenKernel, device: torch.device) -> VarlenPlan:
    """Plan sequences and their keys for a variable-length kernel."""
    lengths, seen = layout.sequences()  # rows of each sequence, and the prefix rows that it sees
    starts = lengths.cumsum(0) - lengths
    # Kernels are not required to accept sequences without queries, so empty texts are left out; they have no rows.
    used = lengths > 0
    lengths, seen, starts = lengths[used], seen[used], starts[used]
    cu_q, cu_k = offsets_from_lengths(lengths), offsets_from_lengths(lengths + seen)
    key_rows = None
    if layout.prefix:
        # The keys of a sequence are the prefix rows that it sees (packed rows 0 to P - 1), then the sequence's rows.
        # `within` numbers the keys of a sequence from 0; beyond the prefix it is shifted to the sequence's first row.
        within = torch.arange(int(cu_k[-1])) - torch.repeat_interleave(cu_k[:-1], lengths + seen)
        shift = torch.repeat_interleave(starts - seen, lengths + seen)
        in_prefix = within < torch.repeat_interleave(seen, lengths + seen)
        key_rows = torch.where(in_prefix, within, within + shift).to(device)
    cu_q, cu_k = (offsets.to(device, torch.int32) for offsets in (cu_q, cu_k))
    sequences = Sequences(cu_q, cu_k, int(lengths.max()), layout.longest, layout.causal)
    return VarlenPlan(kernel, sequences, key_rows, layout.position_ids(device))


def _refuse_missing(dropout: float, limits: ScoreLimits, name: str, kernel: str) -> None:
    if limits.softcap is not None:
        raise ArgumentError(
            f"attention: {name}: {kernel} cannot cap scores, which the model needs; choose buckets or flash"
        )
    if dropout > 0:
        raise ArgumentError(
            f"attention: {name}: {kernel} has no dropout, and the backbone's attention_dropout is {dropout}; "
            "choose buckets or flash"
        )


def _torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scaling: float, dropout: float
) -> Tensor:
    """Run torch.nn.attention.varlen; raises ValueError for dropout and capped scores, which it does not support."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse_missing(dropout, sequences.limits, "varlen", "torch's kernel")
    groups, shares = query.shape[1] // key.shape[1], dict[str, Any]()
    if groups > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        shares["enable_gqa"] = True
    elif groups > 1:  # the first releases of varlen_attn lack it
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out: Any = varlen_attn(query, key, value, *sequences[:4], scale=scaling, window_size=sequences.window(), **shares)
    assert isinstance(out, Tensor)
    return out


def _flash(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scaling: float, dropout: float) -> Tensor:
    """Run the kernel of the flash-attn package."""
    # Imported by name: the package is optional, and needs CUDA to build.
    kernel = importlib.import_module("flash_attn").flash_attn_varlen_func
    out: Tensor = kernel(
        query,
        key,
        value,
        *sequences[:4],
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=sequences.causal,
        window_size=sequences.window(),
        softcap=sequences.limits.softcap or 0.0,
    )
    return out


def _flex(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scaling: float, dropout: float) -> Tensor:
    """Run FlexAttention with a block mask; raises ValueError for dropout and capped scores, which are not supported.

    On a CPU, where only tests call it, it is not compiled.
    """
    _refuse_missing(dropout, sequences.limits, "flex", "FlexAttention")
    attention, blocks = _flex_functions(query.is_cuda)
    cu_q, cu_k, causal, window = sequences.cu_q, sequences.cu_k, sequences.causal, sequences.limits.window
    of_query, of_key = _sequence_of_row(query.shape[0], cu_q), _sequence_of_row(key.shape[0], cu_k)
    # Row r and column c are packed; this shift aligns the last query of a sequence with its last key.
    behind = (cu_k[1:] - cu_q[1:])[of_query.long()]

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen, distance = of_query[row] == of_key[column], row + behind[row] - column
        if window is not None:
            seen = seen & (distance.abs() < window)
        return seen & (distance >= 0) if causal else seen

    mask = blocks(sees, None, None, query.shape[0], key.shape[0], device=str(query.device))
    heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
    out: Tensor = attention(*heads_first, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return out[0].transpose(0, 1)


def _sequence_of_row(rows: int, starts: Tensor) -> Tensor:
    """Index of each row's sequence: [rows] int32; starts: offsets [n + 1] of the sequences."""
    return torch.bucketize(torch.arange(rows, device=starts.device), starts[1:], right=True, out_int32=True)


@functools.cache
def _flex_functions(compiled: bool) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    """Return FlexAttention and its mask builder; compiled for dynamic shapes, as they differ in every batch, if
    `compiled`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not compiled:
        return flex_attention, create_block_mask
    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)


def _needs_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else f"runs on CUDA only (this is {device.type})"


def _needs_tensor_cores(device: torch.device, dtype: torch.dtype) -> str | None:
    if problem := _needs_cuda(device, dtype):
        return problem
    if dtype not in (torch.bfloat16, torch.float16):
        return f"runs in bfloat16 or float16 (this is {str(dtype).removeprefix('torch.')})"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 (this GPU has {capability[0]}.{capability[1]})"
    return None


def _flash_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "is not installed (pip install flash-attn)"
    return _needs_tensor_cores(device, dtype)


register_backend(AttentionBackend("varlen", _torch_varlen, _needs_tensor_cores))
register_backend(AttentionBackend("flash", _flash, _flash_problem, has_softcap=True))
register_backend(AttentionBackend("buckets", None, lambda device, dtype: None, has_softcap=True))
register_backend(AttentionBackend("flex", _flex, _needs_cuda))  # after buckets: "auto" never gets here
