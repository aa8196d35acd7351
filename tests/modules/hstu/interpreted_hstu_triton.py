"""Run by test_hstu_triton.py in a process of its own with TRITON_INTERPRET=1: the interpreter changes triton for good.

Every case is compared with the eager backend, which test_hstu.py holds against a loop written from the equations.
The interpreter takes milliseconds for each operation on a tile (16 x 16 here): few tiles, few time buckets.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hllm_torchrec.modules.encoders.base import PackedRows, Queries, pack_rows
from hllm_torchrec.modules.encoders.shapes import HSTUShape
from hllm_torchrec.modules.hstu.attention import plan_layout, pointwise_attention
from hllm_torchrec.modules.hstu.layer import HSTU
from hllm_torchrec.modules.hstu.layout import AttentionRules, RelativeBias
from hllm_torchrec.modules.hstu.triton_backend import bucket_edges

LONG = 10**12
"""Seconds: beyond 32 bits."""


class Case(NamedTuple):
    """What is compared: positions: rows of the position table."""

    window: int | None = None
    prefix: int = 0
    divide_by: int | None = 7
    last_bucket: int | None = None
    positions: int = 40
    heads: int = 1
    lengths: tuple[int, ...] = (5, 0, 17)
    visible: tuple[tuple[int, ...], ...] = ((4, 1), (0,), (17, 2))

    @property
    def rules(self) -> AttentionRules:
        return AttentionRules(self.window, self.prefix, self.divide_by, 0.7, self.last_bucket)


CASES = {
    "bias, two heads": Case(last_bucket=128, heads=2),
    "own length": Case(divide_by=None, lengths=(5, 0, 33)),
    "window": Case(window=7, divide_by=None, last_bucket=9),
    "window of one": Case(window=1, visible=((), (0, 0), (5,))),
    "prefix": Case(prefix=3, divide_by=None, last_bucket=9),
    "prefix and window": Case(prefix=18, window=4, divide_by=None, lengths=(40, 3, 17)),
    "table shorter than the history": Case(positions=3, last_bucket=4, visible=((), (), ()), lengths=(33,)),
}


def packed(case: Case) -> PackedRows:
    """Positions ask one second after their event, queries later."""
    generator = torch.Generator().manual_seed(1)
    total, asks = sum(case.lengths), [v for row in case.visible for v in row]
    times = torch.randint(0, 30, (total,), generator=generator).sort().values + LONG
    offsets = torch.tensor([0, *case.lengths]).cumsum(0)
    counts = torch.tensor([0, *map(len, case.visible[: len(case.lengths)])]).cumsum(0)
    at = torch.randint(30, 90, (len(asks),), generator=generator) + LONG
    queries = Queries(torch.zeros(len(asks), 1), counts, torch.tensor(asks, dtype=torch.int64), at)
    return pack_rows(offsets, total, times, queries if asks else None, times + 1)


def bias_of(case: Case) -> RelativeBias | None:
    if case.last_bucket is None:
        return None
    bias = RelativeBias(case.positions, case.last_bucket)
    for table in bias.parameters():
        torch.nn.init.normal_(table)
    return bias


def found(case: Case, backend: str) -> tuple[Tensor, ...]:
    """The sums, then the gradients of q, k, v and the tables. Heads of 5 and 3 lie apart, as in a projection."""
    torch.manual_seed(0)
    bias, rows = bias_of(case), packed(case)
    x = torch.randn(rows.positions.numel(), case.heads * 13, requires_grad=True)
    q, k, v = (y.unflatten(1, (case.heads, -1)) for y in x.split([n * case.heads for n in (5, 5, 3)], dim=1))
    out = pointwise_attention(q, k, v, plan_layout(rows, case.rules, backend), bias, backend)
    return out, *torch.autograd.grad((out * torch.randn(out.shape)).sum(), [x, *(bias.parameters() if bias else ())])


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_eager_backend(name: str) -> None:
    triton, eager = (found(CASES[name], backend) for backend in ("triton", "eager"))
    torch.testing.assert_close(triton, eager, rtol=1e-4, atol=1e-5)
    assert all(bool(gradient.any()) for gradient in triton)


def test_all_but_the_position_bias_repeats_bit_for_bit() -> None:
    case = CASES["table shorter than the history"]
    first, again = (found(case, "triton") for _ in range(2))
    assert [torch.equal(a, b) for a, b in zip(first, again) if a.numel() != case.positions] == [True] * 3
    torch.testing.assert_close(first, again)


def test_a_model_with_it_equals_one_with_the_eager_backend() -> None:
    outputs = []
    for backend in ("triton", "eager"):
        torch.manual_seed(0)
        shape = HSTUShape(width=6, layers=2, heads=2, max_positions=9, divide_by=4, time_of="next", backend=backend)
        x, times = torch.randn(9, 6), torch.arange(9) * 50
        outputs.append(HSTU(shape)(x, torch.tensor([0, 7, 9]), times, None, times + 20)[0])
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


def test_time_buckets_are_exact_at_their_edges() -> None:
    edges = bucket_edges(128, torch.device("cpu"))[[1, 2, 5, 40, 70, 90, 110, 128]]
    times = torch.cat([torch.zeros(1, dtype=torch.int64), edges - 1, edges]).sort().values
    rows, bias = pack_rows(torch.tensor([0, times.numel()]), times.numel(), times), RelativeBias(1, 128)
    with torch.no_grad():
        bias.of_time.copy_(torch.arange(129) / 10)
    ones, rules = torch.ones(times.numel(), 1, 1), AttentionRules(None, 0, 1, 0.0, 128)
    triton, eager = (
        pointwise_attention(ones, ones, ones, plan_layout(rows, rules, backend), bias, backend)
        for backend in ("triton", "eager")
    )
    torch.testing.assert_close(triton, eager, rtol=1e-6, atol=1e-6)


def plain(x: Tensor, offsets: list[int], backend: str = "triton") -> Tensor:
    """Without a bias or a window."""
    rows, rules = pack_rows(torch.tensor(offsets), x.shape[0]), AttentionRules(None, 0, 100, 1.0, None)
    return pointwise_attention(x, x, x, plan_layout(rows, rules, backend), None, backend)


def test_nothing_of_a_later_position_or_another_sequence_reaches_a_row() -> None:
    x = torch.randn(40, 1, 4)
    before = plain(x, [0, 3, 38, 40])
    x[22] += 1.0
    changed = (plain(x, [0, 3, 38, 40]) != before).any(-1).flatten().nonzero().flatten().tolist()
    assert changed == list(range(22, 38))


def test_half_precision_is_summed_in_float32() -> None:  # bfloat16 products are beyond the interpreter
    x = torch.randn(100, 1, 4).half()
    output = plain(x, [0, 100])
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.double(), plain(x.double(), [0, 100], "eager"), rtol=4e-3, atol=1e-3)


def test_no_rows_at_all_run_through() -> None:
    empty = torch.zeros(0, 1, 4, requires_grad=True)
    out = plain(empty, [0, 0])
    out.sum().backward()
    assert out.shape == (0, 1, 4) and empty.grad is not None


def test_what_the_kernels_lack_is_an_error() -> None:
    with pytest.raises(ValueError, match="'triton': has no kernels for float64: use float32"):
        plain(torch.zeros(2, 1, 4).double(), [0, 2])
    with pytest.raises(ValueError, match="^qk_width: 512: 'triton' takes heads up to 256 wide"):
        plain(torch.zeros(2, 1, 512), [0, 2])
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="summed with atomics, in no fixed order"):
            found(CASES["window"], "triton")
    finally:
        torch.use_deterministic_algorithms(False)
