"""Item sub-sampling: the share that is drawn gets the plain gradients, the rest comes from a cache that ages."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hllm_torchrec.distributed.collectives import world_size
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.models.item_subsampling import SubsampledEncoder
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import config, losses, train

ITEMS = torch.tensor([0, 3, 5, 8, 9, 17, 20, 22])


def item_llm(seed: int = 0) -> ItemLLM:
    torch.manual_seed(seed)
    model = fixtures.model(fixtures.config()).item_llm
    assert model is not None
    return model


def encoder() -> ItemEncoder:
    return ItemEncoder(fixtures.token_store(), torch.device("cpu"))


def gradients(model: ItemLLM, rows: Tensor) -> list[Tensor]:
    """Of a loss that weighs every row differently."""
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (rows * weights).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_gradients_are_the_plain_ones_of_the_drawn_items_and_values_are_exact_with_nothing_aged() -> None:
    model, plain = item_llm(), encoder()
    sampled = SubsampledEncoder(plain, share=0.5, refresh_after=0, seed=3)
    rows = sampled(model, ITEMS)
    drawn = sampled.draw()[ITEMS]
    assert 0 < drawn.sum() < ITEMS.numel()
    expected = plain(model, ITEMS)
    torch.testing.assert_close(rows, expected, atol=1e-6, rtol=0)
    found = gradients(model, rows)
    wanted = gradients(model, torch.where(drawn[:, None], plain(model, ITEMS), expected.detach()))
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


def test_an_embedding_is_as_old_as_allowed_and_no_older() -> None:
    model, sampled = item_llm(), SubsampledEncoder(encoder(), share=1e-9, refresh_after=2, seed=0)
    first = sampled(model, ITEMS).detach()
    with torch.no_grad():
        model.item_token.add_(1.0)
    changed = encoder()(model, ITEMS)
    for _ in range(2):
        torch.testing.assert_close(sampled(model, ITEMS).detach(), first, atol=0, rtol=0)
    torch.testing.assert_close(sampled(model, ITEMS), changed, atol=1e-6, rtol=0)


def test_other_items_are_drawn_at_each_step_in_the_share_asked_for() -> None:
    model, sampled = item_llm(), SubsampledEncoder(encoder(), share=0.25, refresh_after=10, seed=0)
    draws = []
    for _ in range(40):
        sampled(model, ITEMS)
        draws.append(sampled.draw())
    share = torch.stack(draws).float().mean()
    assert 0.2 < float(share) < 0.3
    assert len({tuple(draw.tolist()) for draw in draws}) == 40


def test_without_gradients_every_item_is_encoded_by_the_present_weights() -> None:
    model, sampled = item_llm(), SubsampledEncoder(encoder(), share=0.5, refresh_after=100, seed=0)
    sampled(model, ITEMS)
    with torch.no_grad():
        model.item_token.add_(1.0)
        torch.testing.assert_close(sampled(model, ITEMS), encoder()(model, ITEMS), atol=0, rtol=0)
    assert sampled.step == 1


def test_cached_items_cost_no_tokens() -> None:
    model, plain = item_llm(), encoder()
    sampled = SubsampledEncoder(plain, share=1e-9, refresh_after=100, seed=0)
    sampled(model, ITEMS)
    spent = plain.work.tokens
    sampled(model, ITEMS)
    assert plain.work.tokens == spent > 0


def on_two_ranks() -> tuple[list[Tensor], int]:
    """Gradients summed over ranks whose items differ, the second rank without any of those drawn."""
    rank, model = torch.distributed.get_rank(), item_llm()
    sampled = SubsampledEncoder(encoder(), share=0.5, refresh_after=0, seed=3)
    sampled.step = 1
    drawn = sampled.draw()[ITEMS]
    sampled.step = 0
    mine = ITEMS if rank == 0 else ITEMS[~drawn]
    rows = sampled(model, mine)
    weights = torch.randn(len(ITEMS), rows.shape[1], generator=torch.Generator().manual_seed(1))
    own = weights if rank == 0 else weights[~drawn]
    (rows * own).sum().backward()
    found = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    for gradient in found:
        torch.distributed.all_reduce(gradient)
    return found, world_size()


def test_two_ranks_draw_the_same_items_and_share_their_gradients() -> None:
    (found, world), _ = run_ranks(on_two_ranks, 2)
    assert world == 2
    model = item_llm()
    rows = SubsampledEncoder(encoder(), share=0.5, refresh_after=0, seed=3)(model, ITEMS)
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    (rows * weights).sum().backward()
    expected = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


@pytest.fixture
def job() -> object:
    yield
    destroy_distributed()


@pytest.mark.slow
@pytest.mark.usefixtures("job")
def test_a_run_with_a_share_trains_and_a_share_of_one_is_the_plain_run(tmp_path: Path) -> None:
    train(config(tmp_path / "plain"))
    train(config(tmp_path / "half", item_llm__trained_share=0.5, item_llm__refresh_after=0))
    assert losses(tmp_path / "half")[0] == pytest.approx(losses(tmp_path / "plain")[0], abs=1e-5)
    assert losses(tmp_path / "half") != losses(tmp_path / "plain")


@pytest.mark.usefixtures("job")
def test_an_experiment_takes_the_share_from_the_configuration(tmp_path: Path) -> None:
    def built(share: float) -> Experiment:
        return build_experiment(config(tmp_path, item_llm__trained_share=share), init_distributed())

    sampled = built(0.25).hllm.item_source.encode
    assert isinstance(sampled, SubsampledEncoder) and (sampled.share, sampled.refresh_after) == (0.25, 20)
    assert isinstance(built(1.0).hllm.item_source.encode, ItemEncoder)
