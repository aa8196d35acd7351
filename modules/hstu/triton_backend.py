"""The Triton backend of HSTU's pointwise attention: launches the kernels of `modules/hstu/triton_kernels.py`.

The kernels are imported when they are first needed: the package `triton` is optional (torch's CUDA build brings it).
They run on CUDA, and on CPU tensors in Triton's interpreter, which is slow and meant for tests: set
TRITON_INTERPRET=1 before Python starts.

A query's own key is not part of the history: its contribution is a few elementwise operations outside of the kernels.

Legend: S packed rows of which T are history and Q queries, B sequences, H heads, D and V widths of a head.
"""

import importlib.util
import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.modules.hstu.layout import BUCKET_WIDTH, Layout, RelativeBias, own_keys

WIDEST_HEAD = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPIES = 64
"""Partial sums of the position table's gradient: programs are spread over them, so that fewer atomics collide."""


@cache
def unavailable_reason(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton, of the version that torch names)"
    if device.type == "cpu" and not _interprets():
        return "it needs CUDA (tests may run it on a CPU: set TRITON_INTERPRET=1 before Python starts)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    return None if device.type in ("cpu", "cuda") else "it needs CUDA"


@cache
def _interprets() -> bool:
    knobs: Any = importlib.import_module("triton").knobs
    return bool(knobs.runtime.interpret)


@cache
def bucket_edges(last: int, device: torch.device) -> Tensor:
    """Compute the first second of each time bucket 0 to `last` of `time_bucket`: [last + 1] int64."""

    def bucket(seconds: int) -> int:
        return math.floor(math.log(seconds) / BUCKET_WIDTH)

    edges, most = [], 2**63 - 1
    for number in range(last + 1):
        low, high = 1, most
        # Bisection for the smallest number of seconds whose bucket is at least `number`, over all of int64.
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if bucket(middle) >= number else (middle + 1, high)
        edges.append(low)
    return torch.tensor(edges, device=device)


class Launch(NamedTuple):
    """One kernel launch over tiles of `rows` rows, for each head if `by_head`; `block`: name of the tile size."""

    kernel: Any
    arguments: dict[str, Any]
    rows: int
    block: str
    by_head: bool = True

    def run(self, sequences: int, heads: int) -> None:
        """Launch on the current stream."""

        def grid(chosen: dict[str, Any]) -> tuple[int, ...]:
            # Enough tiles for any lengths with this sum, so the host never reads the offsets back (see
            # `triton_kernels`). The tile size is known only here: the autotuner chooses it.
            tiles = self.rows // int(chosen[self.block]) + sequences
            return (tiles, heads) if self.by_head else (tiles,)

        self.kernel[grid](**self.arguments)


class Call(NamedTuple):
    """The inputs of one attention, and the launches that compute it; tables are None without a relative bias."""

    q: Tensor
    k: Tensor
    v: Tensor
    of_position: Tensor | None
    of_time: Tensor | None
    layout: Layout

    @property
    def asking(self) -> list[tuple[bool, Tensor, int, int]]:
        """(is history, offsets, first row, number of rows) of the history and, if there are any, of the queries."""
        # History and queries are separate launches: HISTORY is a compile-time constant of the kernels.
        rows = self.layout.rows
        history = (True, rows.seq_offsets, 0, rows.history)
        number = rows.visible.numel()
        return [history, (False, rows.query_offsets, rows.history, number)] if number else [history]

    def common(self) -> dict[str, Any]:
        """Arguments of every kernel."""
        rows, rules = self.layout.rows, self.layout.rules
        has_bias = self.of_position is not None and self.of_time is not None
        last = rules.last_bucket if has_bias and rules.last_bucket is not None else 0
        nothing = self.layout.divisor  # kernels need some pointer; without HAS_BIAS it is never read
        tables = (self.of_position, self.of_time, bucket_edges(last, self.q.device)) if has_bias else (nothing,) * 3
        strides = _strides(q=self.q, k=self.k, v=self.v)
        return strides | {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            "key_offsets": rows.seq_offsets,
            "positions": rows.positions,
            "asked_at": rows.asked_at,
            "times": rows.times,
            "divisor": self.layout.divisor,
            **dict(zip(("of_position", "of_time", "edges"), tables, strict=True)),
            "sequences": rows.seq_offsets.numel() - 1,
            "alpha": rules.alpha,
            "WIDTH": self.q.shape[2],
            "VALUE_WIDTH": self.v.shape[2],
            # Tiles have power-of-two widths; loads beyond WIDTH are masked to zero.
            "D": _padded(self.q.shape[2]),
            "V": _padded(self.v.shape[2]),
            "HAS_BIAS": has_bias,
            "LAST_POSITION": self.of_position.numel() - 1 if self.of_position is not None else 0,
            "LAST_BUCKET": last,
            "WINDOW": rules.window or 0,
            "PREFIX": rules.prefix,
            # Follows torch's own setting, so that both backends round alike.
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        }

    def by_rows(self, kernel: Any, arguments: dict[str, Any], by_head: bool = True) -> list[Launch]:
        """Launch a kernel over the bands of history rows, and over those of query rows."""
        return [
            Launch(
                kernel,
                arguments | {"ask_offsets": offsets, "ask_base": base, "HISTORY": history},
                number,
                "BLOCK_M",
                by_head,
            )
            for history, offsets, base, number in self.asking
        ]

    def forward(self, out: Tensor) -> list[Launch]:
        """Launches that fill out [S, H, V]."""
        arguments = self.common() | {"out": out} | _strides(out=out)
        return self.by_rows(_kernels().forward, arguments)

    def backward(self, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> list[Launch]:
        """Launches that fill dq [S, H, D] and the history rows of dk [S, H, D] and dv [S, H, V]."""
        common = self.common() | {"grad": grad} | _strides(grad=grad)
        rows = self.layout.rows
        by_keys = common | {"dk": dk, "dv": dv} | _strides(dk=dk, dv=dv)
        by_keys |= {"ask_offsets": rows.seq_offsets, "query_offsets": rows.query_offsets, "ask_base": rows.history}
        by_keys |= {"HISTORY": True, "HAS_QUERIES": rows.visible.numel() > 0}
        return [
            *self.by_rows(_kernels().backward_rows, common | {"dq": dq} | _strides(dq=dq)),
            Launch(_kernels().backward_keys, by_keys, rows.history, "BLOCK_N"),
        ]

    def backward_biases(self, grad: Tensor) -> tuple[list[Launch], list[Tensor], list[Tensor]]:
        """Launches, and the partial sums of both tables' gradients that they write to."""
        assert self.of_position is not None and self.of_time is not None
        buckets = _padded(self.of_time.numel())
        common = self.common() | {"grad": grad} | _strides(grad=grad)
        common |= {"HEADS": self.q.shape[1], "COPIES": COPIES, "BUCKETS": buckets}
        launches, of_position, of_time = [], [], []
        for launch in self.by_rows(_kernels().backward_biases, common, by_head=False):
            # One row of time sums per program. The autotuner may choose any tile size, so count programs for the
            # smallest; programs without rows write nothing, hence zeros.
            bands = launch.rows // _kernels().SMALLEST_BAND + common["sequences"]
            of_position.append(grad.new_zeros(COPIES, self.of_position.numel(), dtype=torch.float32))
            of_time.append(grad.new_zeros(bands, buckets, dtype=torch.float32))
            launch.arguments.update(position_parts=of_position[-1], time_parts=of_time[-1])
            launches.append(launch)
        return launches, of_position, of_time

    def run(self, launches: list[Launch]) -> None:
        """Run launches on the device of the inputs."""
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(self.q):
            for launch in launches:
                launch.run(self.layout.rows.seq_offsets.numel() - 1, self.q.shape[1])


def _padded(width: int) -> int:
    """Round up to a power of two (tl.arange needs one) of at least 16 (the smallest side of tl.dot)."""
    return max(16, 1 << (width - 1).bit_length())


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Strides between rows and between heads; the stride along a head's width must be 1."""
    steps: dict[str, int] = {}
    for name, x in tensors.items():
        assert x.stride(2) == 1 or x.shape[2] == 1 or x.numel() == 0, "rows of a head lie together"
        steps |= {f"{name}_row": x.stride(0), f"{name}_head": x.stride(1)}
    return steps


@cache
def _kernels() -> Any:
    return importlib.import_module("hllm_torchrec.modules.hstu.triton_kernels")


class _HistoryAttention(torch.autograd.Function):
    """Attention of all rows over history keys alone (a query's own key is added in `attend`): [S, H, V]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        of_position: Tensor | None,
        of_time: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        """Save the inputs alone: scores exist in registers only."""
        ctx.save_for_backward(q, k, v, of_position, of_time)
        ctx.layout = layout
        call = Call(q, k, v, of_position, of_time, layout)
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        call.run(call.forward(out))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Recompute the scores tile by tile."""
        q, k, v, of_position, of_time = ctx.saved_tensors
        # The incoming gradient may be an expanded view with strides of 0, which `_strides` refuses.
        call, grad = Call(q, k, v, of_position, of_time, ctx.layout), grads[0].contiguous()
        # The kernels write every row of dq, but only history rows of dk and dv: queries are not keys there.
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        for of_queries in (dk[ctx.layout.rows.history :], dv[ctx.layout.rows.history :]):
            of_queries.zero_()
        call.run(call.backward(grad, dq, dk, dv))
        if of_position is None or of_time is None or not any(ctx.needs_input_grad[3:5]):
            return dq, dk, dv, None, None, None
        # The biases have a pass of their own, as their gradients sum over heads, which the other kernels split.
        launches, position_parts, time_parts = call.backward_biases(grad)
        call.run(launches)
        of_positions = torch.cat(position_parts).sum(0).to(of_position.dtype)
        of_times = torch.cat(time_parts).sum(0)[: of_time.numel()].to(of_time.dtype)
        return dq, dk, dv, of_positions, of_times, None


@torch.compiler.disable  # already compiled kernels; traced, this would be recompiled for each batch's shapes
def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: RelativeBias | None) -> Tensor:
    """Compute a [S, H, V] of q [S, H, D], k [S, H, D], v [S, H, V], all of one dtype; see `pointwise_attention`.

    The position table's gradient is summed with atomics: it may differ in its last bits from run to run.

    Raises:
        ValueError: an unsupported dtype or head width, or a trained bias under torch's deterministic algorithms.
    """
    _check(q, v, bias)
    tables = (None, None) if bias is None else (bias.of_position, bias.of_time)
    out: Tensor = _HistoryAttention.apply(q, k, v, *tables, layout)
    if layout.rows.visible.numel():
        out = out + own_keys(q, k, v, layout, bias) / layout.divisor.to(out.dtype)
    return out


def _check(q: Tensor, v: Tensor, bias: RelativeBias | None) -> None:
    if q.dtype not in DTYPES:
        name = str(q.dtype).removeprefix("torch.")
        raise ArgumentError(f"backend: 'triton': has no kernels for {name}: use float32, bfloat16 or 'eager'")
    for field, width in (("qk_width", q.shape[2]), ("value_width", v.shape[2])):
        if width > WIDEST_HEAD:
            raise ArgumentError(
                f"{field}: {width}: 'triton' takes heads up to {WIDEST_HEAD} wide: use more heads, or "
                "the backend 'eager'"
            )
    # torch's own nondeterministic operations raise in this mode as well; in evaluation nothing is summed with atomics.
    trains = bias is not None and torch.is_grad_enabled() and bias.of_position.requires_grad
    if (
        trains
        and torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    ):
        raise ArgumentError(
            "backend: 'triton': the position bias's gradient is summed with atomics, in no fixed order, "
            "but torch.use_deterministic_algorithms is on: use 'eager', or relative_bias: false"
        )
