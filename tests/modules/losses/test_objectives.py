"""The objectives against naive loops, in value and gradient."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hllm_torchrec.modules.losses import objectives
from hllm_torchrec.modules.losses.objectives import (
    Exclusion,
    InfoNceOutput,
    LogitScale,
    binary_cross_entropy,
    info_nce,
    mean_cosine,
)

SEQUENCES = [[1, 2, 3], [2, 7], [], [4]]
"""Ids of the users' sequences. All but the first id of each is a target; negatives repeat and collide."""
NEGATIVE_IDS = [2, 8, 3, 2, 9, 7, 1]


def example(dtype: torch.dtype = torch.float64, width: int = 5) -> dict[str, Any]:
    """Inputs of info_nce: predictions for targets 2, 3 (user 0), 7 (user 1) and 4 (user 3)."""
    generator = torch.Generator().manual_seed(0)
    targets = [(2, 0), (3, 0), (7, 1), (4, 3)]

    def vectors(n: int) -> Tensor:
        return torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "predictions": vectors(len(targets)),
        "positives": vectors(len(targets)),
        "negatives": vectors(len(NEGATIVE_IDS)),
        "scale": torch.tensor([7.0], dtype=dtype, requires_grad=True),
        "target_ids": torch.tensor([id for id, _ in targets]),
        "negative_ids": torch.tensor(NEGATIVE_IDS),
        "exclude": Exclusion(
            ids=torch.tensor([id for sequence in SEQUENCES for id in sequence]),
            offsets=torch.tensor([0, 3, 5, 5, 6]),
            row_to_sequence=torch.tensor([user for _, user in targets]),
        ),
    }


def by_loop(
    predictions: Tensor,
    positives: Tensor,
    negatives: Tensor,
    scale: Tensor,
    target_ids: Tensor,
    negative_ids: Tensor,
    exclude: Exclusion | None,
) -> InfoNceOutput:
    """Eq. (1) as written, one prediction and one negative at a time."""
    each, n_left, n_right = [predictions.sum() * 0], 0, 0
    for t in range(len(predictions)):
        banned = {int(target_ids[t])}
        if exclude is not None:
            banned |= set(SEQUENCES[int(exclude.row_to_sequence[t])])

        def similarity(x: Tensor, row: int = t) -> Tensor:
            return scale[0] * torch.cosine_similarity(predictions[row], x, dim=0)

        positive = similarity(positives[t])
        left = [similarity(negatives[k]) for k in range(len(negatives)) if int(negative_ids[k]) not in banned]
        each.append(-(positive.exp() / (positive.exp() + sum(s.exp() for s in left))).log())
        n_left += len(left)
        n_right += all(bool(positive > s) for s in left)
    n = len(predictions)
    return InfoNceOutput(torch.stack(each).sum(), torch.tensor(n), torch.tensor(n_left / n), torch.tensor(n_right / n))


def gradients(output: InfoNceOutput, inputs: dict[str, Any]) -> list[Tensor]:
    leaves = [inputs[name] for name in ("predictions", "positives", "negatives", "scale")]
    return list(torch.autograd.grad(output.loss_sum * 0.5, leaves))


@pytest.mark.parametrize("with_exclusion", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_info_nce_equals_the_loop(dtype: torch.dtype, chunk_size: int, with_exclusion: bool) -> None:
    inputs = example(dtype)
    if not with_exclusion:
        inputs["exclude"] = None
    got, expected = info_nce(**inputs, chunk_size=chunk_size), by_loop(**inputs)
    torch.testing.assert_close(got.loss_sum, expected.loss_sum)
    assert got.count == expected.count == 4 and got.count.dtype == torch.int64
    assert got.effective_negatives.item() == pytest.approx(expected.effective_negatives.item())
    assert got.accuracy.item() == pytest.approx(expected.accuracy.item())
    for a, b in zip(gradients(got, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(a, b)


def by_published_code(inputs: dict[str, Any], threshold: float) -> Tensor:
    """The published `nce_loss`: negatives like the positive are masked, whatever their ids."""
    cosine, negatives = torch.nn.functional.cosine_similarity, inputs["negatives"][None]
    logits = cosine(inputs["predictions"][:, None], negatives, dim=-1)
    alike = cosine(inputs["positives"][:, None], negatives, dim=-1)
    logits = logits.masked_fill(alike > threshold, torch.finfo(logits.dtype).min)
    positive = cosine(inputs["predictions"], inputs["positives"])[:, None]
    logits = torch.cat([positive, logits], dim=-1) * inputs["scale"]
    return torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="sum")


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_a_cosine_mask_alone_is_the_published_loss(chunk_size: int) -> None:
    inputs = example()
    inputs["exclude"] = None
    # Targets that are drawn as negatives have one embedding.
    for row, column in ((0, 0), (0, 3), (1, 2), (2, 5)):
        inputs["negatives"].data[column] = inputs["positives"].data[row]
    inputs["negatives"].data[1] = 1.5 * inputs["positives"].data[1] + 0.01  # another item, nearly the same text
    got, expected = info_nce(**inputs, cosine_above=0.99, chunk_size=chunk_size), by_published_code(inputs, 0.99)
    assert got.effective_negatives.item() == (4 * 7 - 5) / 4
    torch.testing.assert_close(got.loss_sum, expected)
    leaves = [inputs[name] for name in ("predictions", "positives", "negatives", "scale")]
    for mine, theirs in zip(gradients(got, inputs), torch.autograd.grad(expected * 0.5, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not torch.isclose(got.loss_sum, info_nce(**inputs).loss_sum)


def test_info_nce_passes_gradcheck() -> None:
    inputs = example()
    leaves = [inputs.pop(name) for name in ("predictions", "positives", "negatives", "scale")]
    assert torch.autograd.gradcheck(lambda *x: info_nce(*x, **inputs, chunk_size=3).loss_sum, leaves)


def test_effective_negatives_count_what_the_ids_leave() -> None:
    # Of 2 8 3 2 9 7 1: user 0 keeps 8 9 7 (twice, for two targets), user 1 8 3 9 1, user 3 all seven.
    assert info_nce(**example()).effective_negatives.item() == (3 + 3 + 4 + 7) / 4


def test_identical_embeddings_do_not_empty_the_negatives() -> None:
    """Masking by id, not by cosine: collapse costs log(1 + K) each instead of looking like a loss of 0."""
    ones = torch.ones(4, 5)  # their products are no numbers of few digits: ties differ by rounding
    inputs = example() | {"predictions": ones, "positives": ones}
    inputs |= {"negatives": torch.ones(7, 5), "exclude": None, "target_ids": torch.full((4,), 99)}
    output = info_nce(**inputs)
    assert output.effective_negatives == 7 and output.accuracy == 0
    torch.testing.assert_close(output.loss_sum, torch.tensor(4 * math.log(8)), check_dtype=False)


def test_accuracy_counts_positives_that_are_above_by_more_than_rounding() -> None:
    inputs = example() | {"predictions": torch.ones(4, 5), "exclude": None, "target_ids": torch.full((4,), 99)}
    inputs |= {"positives": torch.ones(4, 5) * torch.tensor([[1.0], [2.0], [3.0], [0.1]])}  # all of one direction
    near, far = torch.ones(7, 5, dtype=torch.float64), torch.ones(7, 5)
    near[:, 0] += 1e-8
    far[:, 0] = -1.0
    assert info_nce(**inputs | {"negatives": near}).accuracy == 0  # 1 - cosine is below 1e-16
    assert info_nce(**inputs | {"negatives": far}).accuracy == 1


def test_a_row_whose_negatives_are_all_masked_costs_nothing_and_has_no_gradient() -> None:
    inputs = example() | {"negative_ids": torch.full((7,), 2)}  # the target or in the sequence of rows 0-2
    output = info_nce(**inputs, chunk_size=2)
    assert output.effective_negatives.item() == 7 / 4
    row_gradients = gradients(output, inputs)[0]
    assert row_gradients.isfinite().all()
    assert (row_gradients[:3] == 0).all() and (row_gradients[3] != 0).all()


def test_no_predictions_cost_nothing_with_a_graph() -> None:
    inputs = example()
    inputs |= {name: inputs[name][:0].detach().requires_grad_() for name in ("predictions", "positives")}
    inputs["target_ids"] = inputs["target_ids"][:0]
    inputs["exclude"] = inputs["exclude"]._replace(row_to_sequence=torch.zeros(0, dtype=torch.int64))
    output = info_nce(**inputs)
    assert output.loss_sum == output.count == output.effective_negatives == output.accuracy == 0
    assert all((grad == 0).all() for grad in gradients(output, inputs))


def test_no_sequences_mask_the_targets_alone() -> None:
    inputs = example()
    empty = torch.zeros(0, dtype=torch.int64)
    nothing = Exclusion(empty, torch.zeros(5, dtype=torch.int64), inputs["exclude"].row_to_sequence)
    torch.testing.assert_close(
        info_nce(**inputs | {"exclude": nothing}).loss_sum, info_nce(**inputs | {"exclude": None}).loss_sum
    )


def test_frozen_negatives_need_no_gradient() -> None:
    inputs = example()
    inputs["negatives"] = inputs["negatives"].detach()
    (grad,) = torch.autograd.grad(info_nce(**inputs, chunk_size=2).loss_sum, [inputs["predictions"]])
    (expected,) = torch.autograd.grad(by_loop(**inputs).loss_sum, [inputs["predictions"]])
    torch.testing.assert_close(grad, expected)


def test_bfloat16_embeddings_and_autocast_are_computed_in_float32() -> None:
    inputs = example(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(**inputs, chunk_size=2).loss_sum
        loss.backward()
    wide: dict[str, Any] = {
        k: v.detach().float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    assert loss.dtype == torch.float32 and inputs["negatives"].grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, info_nce(**wide).loss_sum)


class LargestTensor(TorchDispatchMode):
    """Remember the largest tensor any operation returns, and how many matrix products there were."""

    numel = products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("n_predictions", [200, 2000])
def test_no_tensor_grows_with_predictions_times_negatives(n_predictions: int) -> None:
    n_negatives, width, chunk_size = 500, 4, 20
    ids = torch.arange(n_predictions)
    exclude = Exclusion(ids, torch.arange(0, n_predictions + 1, 2), ids // 2)
    with LargestTensor() as largest:
        info_nce(
            torch.randn(n_predictions, width, requires_grad=True),
            torch.randn(n_predictions, width),
            torch.randn(n_negatives, width, requires_grad=True),
            torch.ones(1),
            target_ids=ids,
            negative_ids=torch.arange(n_negatives),
            exclude=exclude,
            chunk_size=chunk_size,
        ).loss_sum.backward()
    assert largest.numel <= max((chunk_size + 1) * (n_negatives + 1), n_predictions * width)


def test_chunks_are_chosen_so_that_few_logits_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "MOST_LOGITS", 14)
    with LargestTensor() as largest:
        got = info_nce(**example())  # 4 predictions x 7 negatives
    assert largest.numel <= (2 + 1) * (7 + 1) + 14, "two predictions at a time"
    torch.testing.assert_close(got.loss_sum, info_nce(**example(), chunk_size=4).loss_sum)


def test_a_second_backward_pass_computes_the_gradients_again() -> None:
    """The first one hands out the gradients that the forward pass made, and its caller may change them."""
    inputs = example()
    output = info_nce(**inputs, chunk_size=3)
    leaves = [inputs[name] for name in ("predictions", "positives", "negatives", "scale")]
    first = torch.autograd.grad(output.loss_sum, leaves, retain_graph=True)
    expected = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    for a, b in zip(torch.autograd.grad(output.loss_sum * 3, leaves), expected):
        torch.testing.assert_close(a, 3 * b)


def test_gradients_take_two_more_products_a_chunk_and_none_without_autograd() -> None:
    inputs = example()
    with LargestTensor() as training:
        info_nce(**inputs, chunk_size=2).loss_sum.backward()
    with torch.no_grad(), LargestTensor() as evaluation:
        loss = info_nce(**inputs, chunk_size=2).loss_sum
    assert (training.products, evaluation.products) == (6, 2)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, info_nce(**inputs).loss_sum.detach())


@pytest.mark.parametrize("name", ["predictions", "positives", "negatives", "scale"])
def test_each_input_may_be_the_only_one_with_a_gradient(name: str) -> None:
    inputs = example()
    expected = torch.autograd.grad(info_nce(**inputs).loss_sum, inputs[name])[0]
    alone = {k: v.detach() if isinstance(v, Tensor) and k != name else v for k, v in inputs.items()}
    torch.testing.assert_close(torch.autograd.grad(info_nce(**alone).loss_sum, alone[name])[0], expected)


def test_vectors_of_zero_length_have_finite_gradients() -> None:
    inputs = example()
    for key in ("predictions", "positives", "negatives"):
        inputs[key].data[0] = 0
    found = gradients(info_nce(**inputs), inputs)
    assert all(grad.isfinite().all() for grad in found)
    for grad, key in zip(found, ("predictions", "positives", "negatives")):
        torch.testing.assert_close(grad, by_normalize(inputs)[key], msg=key)


def by_normalize(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients through torch's own normalize, of all pairs at once."""
    names = ("predictions", "positives", "negatives")
    units = {name: torch.nn.functional.normalize(inputs[name], dim=-1, eps=objectives.EPS) for name in names}
    query = units["predictions"] * inputs["scale"]
    owner = inputs["exclude"].row_to_sequence.tolist()
    banned = [[t, *SEQUENCES[u]] for t, u in zip(inputs["target_ids"].tolist(), owner)]
    mask = torch.tensor([[k in row for k in NEGATIVE_IDS] for row in banned])
    logits = (query @ units["negatives"].T).masked_fill(mask, -torch.inf)
    each = torch.logaddexp((query * units["positives"]).sum(-1), logits.logsumexp(1)) - (
        query * units["positives"]
    ).sum(-1)
    return dict(zip(names, torch.autograd.grad(each.sum() * 0.5, [inputs[name] for name in names])))


def test_info_nce_without_negatives_is_an_error() -> None:
    inputs = example()
    inputs |= {"negatives": inputs["negatives"][:0], "negative_ids": inputs["negative_ids"][:0]}
    with pytest.raises(ValueError, match="InfoNCE got no negatives.*sample at least one"):
        info_nce(**inputs)


def test_a_chunk_size_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="InfoNCE chunk size is 0: must be at least 1"):
        info_nce(**example(), chunk_size=0)


def test_the_logit_scale_starts_at_one_over_the_temperature() -> None:
    scale = LogitScale(0.05)
    assert scale.log_scale.shape == (1,)
    torch.testing.assert_close(scale(), torch.tensor([20.0]))


def test_the_logit_scale_stops_at_100_and_comes_back() -> None:
    scale = LogitScale(0.01)
    optimizer = torch.optim.SGD(scale.parameters(), lr=0.001)
    scale.log_scale.data += 0.01  # one step too far
    assert scale().item() == pytest.approx(100)
    (-scale()).sum().backward()  # the loss wants it larger still: no gradient
    assert scale.log_scale.grad is not None and scale.log_scale.grad.item() == 0
    optimizer.zero_grad()
    scale().sum().backward()  # the loss wants it smaller
    optimizer.step()
    assert scale().item() < 95


@pytest.mark.parametrize("temperature", [0.009, 0.0, -1.0, float("nan")])
def test_a_temperature_below_its_limit_is_an_error(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"temperature is {temperature}: must be at least 0\.01"):
        LogitScale(temperature)


def test_binary_cross_entropy_is_the_weighted_sum_of_equation_2() -> None:
    logits = torch.tensor([0.3, -2.0, 40.0], dtype=torch.float64, requires_grad=True)
    labels, weights = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 0.5, 2.0])
    x = logits.sigmoid()
    each = -(labels * x.log() + (1 - labels) * (1 - x).log())
    expected = each[:2].sum(), (each * weights)[:2].sum()
    torch.testing.assert_close(binary_cross_entropy(logits, labels), expected[0] + 40)
    torch.testing.assert_close(binary_cross_entropy(logits, labels, weights), expected[1] + 80)
    (grad,) = torch.autograd.grad(binary_cross_entropy(logits, labels), [logits])
    torch.testing.assert_close(grad, (x - labels).detach())


def test_binary_cross_entropy_of_no_exposures_is_0_with_a_graph() -> None:
    logits = torch.zeros(0, requires_grad=True)
    loss = binary_cross_entropy(logits, torch.zeros(0))
    loss.backward()
    assert loss == 0 and logits.grad is not None


def test_binary_cross_entropy_of_other_shapes_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shapes \[\(3,\), \(3, 1\), None\]: must be equal"):
        binary_cross_entropy(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"\(3,\), \(3,\), \(1,\)\]: must be equal"):
        binary_cross_entropy(torch.zeros(3), torch.zeros(3), torch.ones(1))


def test_the_spread_is_the_mean_cosine_of_different_rows() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosines = torch.cosine_similarity(x[:, None], x[None], dim=-1)
    torch.testing.assert_close(mean_cosine(x), cosines[~torch.eye(6, dtype=torch.bool)].mean())


def test_the_spread_is_1_for_collapsed_and_0_for_orthogonal_rows() -> None:
    collapsed = torch.ones(5, 3, requires_grad=True) * torch.arange(1.0, 6.0)[:, None]
    spread = mean_cosine(collapsed)
    torch.testing.assert_close(spread, torch.tensor(1.0))
    assert not spread.requires_grad
    torch.testing.assert_close(mean_cosine(torch.eye(5)), torch.tensor(0.0))


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_rows_have_no_spread(n: int) -> None:
    assert mean_cosine(torch.ones(n, 3)) == 0
