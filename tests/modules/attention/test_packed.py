"""Packed attention with queries, against stock Hugging Face models that get one sequence at a time."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.modules.attention.packed import packed_attention, plan_attention
from hllm_torchrec.modules.jagged import offsets_from_lengths
from tests.helpers.fixtures import BERT, LLAMA, enlarge

DEEP_LLAMA = {**LLAMA, "num_hidden_layers": 3}
MISTRAL = {**LLAMA, "model_type": "mistral"}


@dataclass
class Case:
    """Lengths of the sequences and, per sequence, how much each of its queries sees."""

    lengths: list[int]
    visible: list[list[int]]

    @property
    def offsets(self) -> Tensor:
        return offsets_from_lengths(torch.tensor(self.lengths, dtype=torch.int64))

    @property
    def query_offsets(self) -> Tensor:
        return offsets_from_lengths(torch.tensor([len(v) for v in self.visible], dtype=torch.int64))

    @property
    def query_visible(self) -> Tensor:
        return torch.tensor([v for row in self.visible for v in row], dtype=torch.int64)


CASES = {
    "many lengths": Case([5, 1, 0, 19, 40, 3, 38], [[5, 0], [1, 0, 1], [0, 0], [], [7, 40, 1, 39, 7], [2], [38]]),
    "one user": Case([6], [[3, 6, 0]]),
    "length one": Case([1, 1], [[1], [0]]),
    "no queries": Case([4, 9], [[], []]),
    "only empty histories": Case([0, 0], [[0, 0], [0]]),
    "an empty history without queries": Case([0, 3], [[], [3]]),
}


def pair(shape: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """The same weights behind packed attention and in the stock model."""
    torch.manual_seed(1)
    packed = enlarge(build_backbone(None, shape)).eval()
    stock = build_backbone(None, shape, attention="eager").eval()
    stock.load_state_dict(packed.state_dict())
    return packed, stock


def run_packed(model: nn.Module, x_SD: Tensor, case: Case, causal: bool = True, **options: Any) -> Tensor:
    plan = plan_attention(
        case.offsets, sum(case.lengths), case.query_offsets, case.query_visible, causal=causal, **options
    )
    return model(
        inputs_embeds=x_SD[None], position_ids=plan.position_ids, use_cache=False, hllm_plan=plan
    ).last_hidden_state[0]


def run_one_by_one(model: nn.Module, x_SD: Tensor, case: Case) -> Tensor:
    """Every sequence alone, and every query alone behind what it sees."""
    total = sum(case.lengths)
    sequences = x_SD[:total].split(case.lengths)
    outputs = [run_stock(model, sequence) for sequence in sequences if len(sequence)]
    number = total
    for sequence, visible in zip(sequences, case.visible):
        for seen in visible:
            outputs.append(run_stock(model, torch.cat([sequence[:seen], x_SD[number : number + 1]]))[-1:])
            number += 1
    return torch.cat(outputs)


def run_stock(model: nn.Module, x_ND: Tensor) -> Tensor:
    return model(inputs_embeds=x_ND[None]).last_hidden_state[0]


def gradients(model: nn.Module, x: Tensor, output: Tensor) -> list[Tensor]:
    """Of the inputs and all weights, for a loss that weighs every output differently."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    loss = (output * weights).sum()
    used = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, [x, *used], materialize_grads=True))


def inputs(case: Case, width: int = 24) -> Tensor:
    size = sum(case.lengths) + case.query_visible.numel()
    return torch.randn(size, width, generator=torch.Generator().manual_seed(3)).requires_grad_()


@pytest.mark.parametrize("name", CASES)
def test_packed_causal_attention_with_queries_equals_one_by_one(name: str) -> None:
    packed, stock = pair(DEEP_LLAMA)
    case = CASES[name]
    x = inputs(case)
    ours, theirs = run_packed(packed, x, case), run_one_by_one(stock, x, case)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for mine, expected in zip(gradients(packed, x, ours), gradients(stock, x, theirs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("lengths", [[5, 1, 12, 23, 24, 3], [1], [2, 2], [24] * 4])
def test_packed_bidirectional_attention_equals_one_by_one(lengths: list[int]) -> None:
    """Also where the packed row is longer than BERT's table of positions (24 here)."""
    packed, stock = pair(BERT)
    case = Case(lengths, [[] for _ in lengths])
    x = inputs(case)
    ours, theirs = run_packed(packed, x, case, causal=False), run_one_by_one(stock, x, case)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for mine, expected in zip(gradients(packed, x, ours), gradients(stock, x, theirs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("most_scores", [1, 100, 2000])
def test_the_limit_of_a_bucket_changes_memory_and_no_value(most_scores: int) -> None:
    packed, _ = pair(DEEP_LLAMA)
    case = CASES["many lengths"]
    x = inputs(case)
    one = run_packed(packed, x, case)
    torch.testing.assert_close(run_packed(packed, x, case, most_scores=most_scores), one, rtol=1e-5, atol=1e-5)


def changed(x: Tensor, row: int) -> Tensor:
    copy = x.detach().clone()
    copy[row] += 3.0
    return copy


def rows_that_change(case: Case, row: int) -> list[int]:
    """Packed rows whose output differs after the input of `row` changed."""
    packed, _ = pair(DEEP_LLAMA)
    x = inputs(case)
    with torch.no_grad():
        before, after = run_packed(packed, x, case), run_packed(packed, changed(x, row), case)
    return torch.nonzero((before - after).abs().amax(1) > 1e-4).flatten().tolist()


@pytest.mark.parametrize("row", range(7))
def test_a_position_reaches_later_positions_and_the_queries_that_see_it_alone(row: int) -> None:
    case = Case([3, 4], [[0, 1, 3], [2, 4]])
    lengths_before = 0 if row < 3 else 3
    user, position = int(row >= 3), row - lengths_before
    expected = list(range(row, lengths_before + case.lengths[user]))
    number = 7
    for owner, visible in enumerate(case.visible):
        for seen in visible:
            expected += [number] if owner == user and seen > position else []
            number += 1
    assert rows_that_change(case, row) == expected


@pytest.mark.parametrize("query", range(5))
def test_a_query_is_seen_by_itself_alone(query: int) -> None:
    assert rows_that_change(Case([3, 4], [[0, 1, 3], [4, 4]]), 7 + query) == [7 + query]


def test_a_query_stands_right_after_what_it_sees() -> None:
    case = CASES["many lengths"]
    plan = plan_attention(case.offsets, sum(case.lengths), case.query_offsets, case.query_visible)
    expected = [i for n in case.lengths for i in range(n)] + [v for row in case.visible for v in row]
    assert plan.position_ids.tolist() == [expected]


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_no_tensor_is_as_large_as_a_mask_over_the_whole_batch() -> None:
    case = Case([16] * 128, [[16, 8]] * 128)
    packed, _ = pair(DEEP_LLAMA)
    with torch.no_grad(), _LargestTensor() as seen:
        run_packed(packed, inputs(case), case)
    total = sum(case.lengths)
    assert 0 < seen.numel < total * total / 10


def test_attention_dropout_acts_in_training_alone() -> None:
    model = build_backbone(None, {**LLAMA, "attention_dropout": 0.5})
    case = CASES["one user"]
    x = inputs(case)
    model.train()
    a, b = run_packed(model, x, case), run_packed(model, x, case)
    assert not torch.equal(a[:6], b[:6]) and not torch.equal(a[6:8], b[6:8])
    model.eval()
    assert torch.equal(run_packed(model, x, case), run_packed(model, x, case))


def test_a_sliding_window_that_cuts_nothing_is_no_window() -> None:
    packed, stock = pair({**MISTRAL, "sliding_window": 7})
    case = CASES["one user"]  # 6 positions and a query behind them
    x = inputs(case)
    torch.testing.assert_close(run_packed(packed, x, case), run_one_by_one(stock, x, case), rtol=1e-4, atol=1e-4)


def test_a_sequence_beyond_a_sliding_window_is_refused() -> None:
    model = build_backbone(None, {**MISTRAL, "sliding_window": 6})
    case = CASES["one user"]
    with pytest.raises(ValueError, match="^length: a sequence has 7 positions, beyond .* sliding window of 6"):
        run_packed(model, inputs(case), case)


@pytest.mark.parametrize(
    ("option", "message"), [({"softcap": 50.0}, "caps its attention"), ({"s_aux": torch.ones(1)}, "sinks")]
)
def test_attention_of_another_kind_is_refused(option: dict[str, Any], message: str) -> None:
    x = torch.randn(1, 1, 2, 4)
    plan = plan_attention(torch.tensor([0, 2]), 2)
    with pytest.raises(ValueError, match=message):
        packed_attention(nn.Identity(), x, x, x, None, scaling=1.0, hllm_plan=plan, **option)
