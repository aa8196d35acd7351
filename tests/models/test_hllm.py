"""The assembled model: against one written out, packed against one by one, losses, next items, assembly."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from hllm_torchrec.config.schema import Config, ParallelConfig
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.events import Piece
from hllm_torchrec.models.build import build_model
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.models.item_source import CachedItems, LiveItems
from hllm_torchrec.models.parallelize import parallelize
from hllm_torchrec.modules.encoders.shapes import ENCODERS
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.naive_model import Naive, alone, config, exposures, run, some_pieces

# ------------------------------------------------------------------- against a model written out


@pytest.mark.parametrize("history", ["all", "positive"])
@pytest.mark.parametrize("fusion", ["late", "early"])
def test_every_logit_equals_the_model_written_out(fusion: str, history: str) -> None:
    """Late: the head joins the user's embedding with the target's; early: the target is in the query."""
    cfg = config(fusion, data={"history": history})
    model = fixtures.model(cfg)
    pieces = [fixtures.pieces("train")[1], fixtures.pieces("valid")[2], fixtures.pieces("train")[0]]
    with torch.no_grad():
        batch, output = run(model, cfg, pieces)
        naive = Naive(model, cfg)
        expected = torch.stack([naive.logit(p, t) for p in pieces for t in exposures(p)])
    assert expected.std() > 0.05, "the exposures differ"
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
    assert batch.num_exposures == len(expected) > 5


@pytest.mark.parametrize("fusion", ["late", "early"])
def test_packed_users_and_exposures_equal_one_exposure_at_a_time(fusion: str) -> None:
    cfg = config(fusion)
    model = fixtures.model(cfg)
    pieces = some_pieces()
    with torch.no_grad():
        packed = run(model, cfg, pieces)[1].logits
        singles = [run(model, cfg, [alone(p, t)])[1].logits for p in pieces for t in exposures(p)]
    assert all(x.shape == (1,) for x in singles)
    torch.testing.assert_close(packed, torch.cat(singles), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", ["late", "early"])
def test_gradients_of_the_packed_loss_equal_those_of_the_exposures_summed(fusion: str) -> None:
    cfg = config(fusion, weight=0.0)
    model = fixtures.model(cfg)
    pieces = some_pieces()[:3]
    weights = [p for p in model.parameters() if p.requires_grad]
    packed = torch.autograd.grad(run(model, cfg, pieces)[1].classification, weights)
    singles = [run(model, cfg, [alone(p, t)])[1].classification for p in pieces for t in exposures(p)]
    summed = torch.autograd.grad(torch.stack(singles).sum(), weights)
    torch.testing.assert_close(packed, summed, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("fusion", ["late", "early", "none"])
def test_loss_sums_and_their_gradients_add_up_over_the_parts_of_a_batch(fusion: str) -> None:
    """What lets ranks hold different numbers of exposures."""
    cfg = config(fusion, objective={"value_weight": 0.3})
    model = fixtures.model(cfg)
    pieces = some_pieces()
    trained = [p for p in model.parameters() if p.requires_grad]

    def losses(part: list[Piece]) -> Tensor:
        output = run(model, cfg, part, training=True)[1]
        assert output.generative is not None
        value = output.classification.new_zeros(()) if output.value_error is None else output.value_error
        return torch.stack([output.classification, value, output.generative.loss_sum])

    whole, parts = losses(pieces), losses(pieces[:1]) + losses(pieces[1:]) + losses([])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)
    assert (whole[2:] > 1).all() and (fusion == "none" or (whole > 1).all())
    gradients = [torch.autograd.grad(x.sum(), trained, materialize_grads=True) for x in (whole, parts)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("history", ["all", "positive"])
def test_the_generative_loss_equals_equation_1_written_out(history: str) -> None:
    """Own items are no negatives; positives and negatives are E itself, without ID, time or projection."""
    cfg = config("late", data={"history": history}, objective={"negatives": 20})
    model = fixtures.model(cfg)
    naive, pieces = Naive(model, cfg), [fixtures.pieces("train")[i] for i in (4, 7)]
    with torch.no_grad():
        batch, output = run(model, cfg, pieces, training=True)
        losses, left = [], []
        for piece in pieces:
            kept = np.flatnonzero(piece.labels == 1) if history == "positive" else range(piece.item_ids.size)
            events = [naive.event(piece, int(i)) for i in kept]
            for row, following in enumerate(kept[1:]):
                if piece.labels[following] == 0:
                    continue
                h = naive.user(inputs_embeds=torch.stack(events[: row + 1])[None]).last_hidden_state[0, -1]
                target = int(piece.item_ids[following])
                excluded = {target, *in_batch(batch, piece)}
                negatives = [i for i in batch.negative_items.tolist() if i not in excluded]
                left.append(len(negatives))
                items = torch.stack([naive.text(i) for i in [target, *negatives]])
                cosine = torch.cosine_similarity(model.project_next(h)[None], items)
                losses.append(-torch.log_softmax(model.logit_scale() * cosine, 0)[0])
    assert output.generative is not None and int(output.generative.count) == len(losses) > 5
    torch.testing.assert_close(output.generative.loss_sum, torch.stack(losses).sum(), rtol=1e-4, atol=1e-4)
    assert output.generative.effective_negatives.item() == pytest.approx(np.mean(left))
    assert max(left) < 20, "something is excluded"


def in_batch(batch: HybridBatch, piece: Piece) -> list[int]:
    index = batch.user_ids.tolist().index(piece.user_id)
    return batch.item_ids[batch.seq_offsets[index] : batch.seq_offsets[index + 1]].tolist()


@pytest.mark.parametrize("fusion", ["late", "early", "none"])
def test_every_parameter_that_is_built_is_trained(fusion: str) -> None:
    cfg = config(fusion, objective={"value_weight": 0.3})
    model = fixtures.model(cfg)
    output = run(model, cfg, fixtures.pieces("train")[:10], training=True)[1]
    assert output.generative is not None
    loss = output.classification + output.generative.loss_sum
    (loss if output.value_error is None else loss + output.value_error).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Generative only: no queries, so nothing reads what belongs to a request.
    at_requests = ["features.tables.embedding_bags.country.weight", "features.numeric.weight"]
    assert sorted(still) == (sorted(at_requests) if fusion == "none" else [])


@pytest.mark.parametrize("fusion", ["late", "early", "none"])
def test_an_empty_batch_has_a_graph_to_every_parameter(fusion: str) -> None:
    cfg = config(fusion)
    model = fixtures.model(cfg)
    output = run(model, cfg, [], training=True)[1]
    assert output.generative is not None and output.logits.shape == (0,)
    loss = output.classification + output.generative.loss_sum
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def first_events() -> list[Piece]:
    """Exposures without a history: the first event of each of two users."""
    return [
        dataclasses.replace(alone(piece, 0), labels=np.full(1, label, np.float32))
        for label, piece in enumerate(fixtures.pieces("train")[1:3])
    ]


@pytest.mark.parametrize("encoder", ["llm", *ENCODERS])
@pytest.mark.parametrize("fusion", ["late", "early"])
def test_users_without_history_have_a_graph_to_every_parameter(fusion: str, encoder: str) -> None:
    shape = {"user": {"encoder": encoder, "shape": {"width": 16, "layers": 2, "heads": 2}}}
    cfg = config(fusion, **({} if encoder == "llm" else shape))
    model = fixtures.model(cfg)
    batch, output = run(model, cfg, first_events(), training=True)
    assert batch.item_ids.numel() == 0 and output.logits.numel() == 2 and output.generative is not None
    (output.classification + output.generative.loss_sum).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def step_of_this_rank(cfg: Config, pieces: list[Piece]) -> list[float]:
    """A step of `pieces` on this rank: its losses, after a backward pass."""
    torch.manual_seed(0)
    tables = fixtures.recipe(cfg).tables(fixtures.dataset())
    model = build_model(cfg, tables, 0.4, torch.device("meta"))
    model.item_source = LiveItems(model.item_llm, ItemEncoder(fixtures.token_store(), torch.device("cpu")))
    sharded = parallelize(model, cfg, torch.device("cpu"))
    for _ in range(2):  # DDP reports a parameter without a gradient at the next step
        output = sharded(fixtures.collator(cfg, training=True)(pieces, 0, 0, dist.get_rank()))
        assert output.generative is not None
        (output.classification + output.generative.loss_sum).backward()
    return [output.classification.item(), output.generative.loss_sum.item()]


def steps_beside_a_busy_rank() -> tuple[list[list[float]], list[list[float]]]:
    """Losses of steps in which the second rank has no users, and of steps in which its users have no history."""
    shards: dict[str, Any] = {"shard_from_rows": 30}  # item ids, years and clocks are sharded
    idle, without_history = ([], first_events()) if dist.get_rank() else (some_pieces(), some_pieces())
    configs = [config(fusion, features=shards) for fusion in ("late", "early", "none")]
    fully_sharded = [dataclasses.replace(cfg, parallel=ParallelConfig(dense="fsdp")) for cfg in configs[:2]]
    return (
        [step_of_this_rank(cfg, idle) for cfg in configs],
        [step_of_this_rank(cfg, without_history) for cfg in configs[:2] + fully_sharded],
    )


@pytest.mark.slow
def test_a_rank_without_users_or_histories_takes_part_in_every_exchange() -> None:
    (busy, idle), (_, without_history) = zip(*run_ranks(steps_beside_a_busy_rank, 2), strict=True)
    assert idle == [[0.0, 0.0]] * 3
    assert all(generative > 1 for _, generative in busy)
    assert all(classification > 0 and generative == 0 for classification, generative in without_history)
    assert without_history[:2] == [pytest.approx(losses, rel=1e-5) for losses in without_history[2:]]


# ------------------------------------------------------------------------------- next items


@pytest.mark.parametrize("fusion", ["early", "none"])
def test_the_predicted_next_item_is_read_where_an_exposures_history_ends(fusion: str) -> None:
    cfg = config(fusion)
    model = fixtures.model(cfg)
    pieces = [fixtures.pieces("train")[1], fixtures.pieces("valid")[2]]
    with torch.no_grad():
        naive = Naive(model, cfg)
        batch = fixtures.collator(cfg)(pieces, 0, 0)
        found = model(batch, want_next=True).next_items
        assert found is not None and model(batch).next_items is None
        expected = []
        for piece in pieces:
            for target in exposures(piece):
                seen = int((piece.timestamps < piece.timestamps[target]).sum())
                expected.append(next_item(naive, piece, seen))
    assert found.shape == (len(expected), fixtures.LLAMA["hidden_size"])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert not found[0].any(), "the first exposure has no history, and no prediction"


def next_item(naive: Naive, piece: Piece, seen: int) -> Tensor:
    """h of the last of `seen` events, from a stock model that reads just them."""
    if seen == 0:
        return torch.zeros(fixtures.LLAMA["hidden_size"])
    row = torch.stack([naive.event(piece, i) for i in range(seen)])
    return naive.model.project_next(naive.user(inputs_embeds=row[None]).last_hidden_state[0, -1])


def test_no_history_at_all_predicts_nothing() -> None:
    cfg = config("late")
    model = fixtures.model(cfg)
    first_event = alone(fixtures.pieces("train")[1], 0)
    batch = fixtures.collator(cfg)([dataclasses.replace(first_event, labels=np.ones(1, np.float32))], 0, 0)
    assert batch.item_ids.numel() == 0 and batch.num_exposures == 1
    found = model(batch, want_next=True).next_items
    assert found is not None and found.shape == (1, fixtures.LLAMA["hidden_size"]) and not found.any()


# ------------------------------------------------------------------------------- assembly


@pytest.mark.parametrize("fusion", ["late", "early"])
def test_lambda_0_builds_nothing_generative(fusion: str) -> None:
    cfg = config(fusion, weight=0.0)
    model = fixtures.model(cfg)
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "project_next" in name or "logit_scale" in name]
    batch, output = run(model, cfg, some_pieces(), training=True)
    assert output.generative is None and batch.negative_items.numel() == 0


def test_generative_only_builds_no_head() -> None:
    cfg = config("none")
    model = fixtures.model(cfg)
    assert not [name for name, _ in model.named_parameters() if "head" in name or "user_token" in name]
    batch, output = run(model, cfg, some_pieces())
    assert output.logits.shape == (0,) and output.classification.item() == 0
    assert batch.num_exposures > 0


@pytest.mark.parametrize(
    ("sections", "frozen"),
    [
        ({"item_llm": {"trainable": False}}, ["item_llm."]),
        ({"user": {"trainable": False}}, ["user."]),
        ({"item_llm": {"freeze_words": True}}, ["item_llm.backbone.embed_tokens."]),
        ({"item_llm": {"trainable": False}, "user": {"trainable": False}}, ["item_llm.", "user."]),
        ({}, []),
    ],
)
def test_frozen_parts_get_no_gradient_and_the_others_do(sections: dict[str, Any], frozen: list[str]) -> None:
    shapes: dict[str, dict[str, Any]] = {
        "item_llm": {"shape": fixtures.LLAMA},
        "user": {"shape": fixtures.USER},
    }
    cfg = config("early", **{name: shapes[name] | given for name, given in sections.items()})
    model = fixtures.model(cfg)
    output = run(model, cfg, some_pieces(), training=True)[1]
    assert output.generative is not None
    (output.classification + output.generative.loss_sum).backward()
    for name, parameter in model.named_parameters():
        is_frozen = any(name.startswith(part) for part in frozen)
        assert parameter.requires_grad is not is_frozen, name
        assert (parameter.grad is None) is is_frozen, name


@pytest.mark.parametrize("fusion", ["late", "early"])
def test_an_id_only_model_has_no_text(fusion: str) -> None:
    cfg = config(fusion, weight=0.0, item_llm={"enabled": False, "shape": None})
    model = fixtures.model(cfg)
    assert not [name for name, _ in model.named_parameters() if "item_llm" in name or "project_item" in name]
    batch, output = run(model, cfg, some_pieces())
    assert output.items is None and output.logits.shape == (batch.num_exposures,)
    assert output.logits.std() > 0.01
    output.classification.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_equal_widths_need_no_projection() -> None:
    same = {"shape": {**fixtures.USER, "hidden_size": 24}}
    model = fixtures.model(config("late", user=same))
    assert not [name for name, _ in model.named_parameters() if "project" in name]
    different = fixtures.model(config("late"))
    assert {name for name, _ in different.named_parameters() if "project" in name} == {
        f"{part}.{kind}" for part in ("project_item", "project_next") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("pooling", ["item", "mean"])
def test_cached_embeddings_equal_live_ones(pooling: str) -> None:
    cfg = config("early", item_llm={"shape": fixtures.LLAMA, "pooling": pooling})
    model = fixtures.model(cfg)
    assert model.item_llm is not None and isinstance(model.item_source, LiveItems)
    batch, live = run(model, cfg, some_pieces(), training=True)
    table = model.item_source.encode.encode_catalogue(model.item_llm, model.embed_items, show=False)
    assert table.shape == (fixtures.ITEMS + 1, fixtures.LLAMA["hidden_size"]) and not table.requires_grad
    assert live.items is not None
    torch.testing.assert_close(table[batch.unique_items], live.items, rtol=1e-5, atol=1e-5)
    model.item_source = CachedItems(table)
    cached = model(batch)
    torch.testing.assert_close(cached.logits, live.logits, rtol=1e-5, atol=1e-5)
    assert cached.generative is not None and live.generative is not None
    torch.testing.assert_close(cached.generative.loss_sum, live.generative.loss_sum, rtol=1e-5, atol=1e-4)
    (cached.classification + cached.generative.loss_sum).backward()
    assert all(p.grad is None for p in model.item_llm.parameters()), "a cache needs no Item LLM"


def test_the_catalogue_is_encoded_in_chunks_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {**fixtures.LLAMA, "attention_dropout": 0.5}
    model = fixtures.model(config("early", item_llm={"shape": shape}))
    assert model.item_llm is not None and isinstance(model.item_source, LiveItems)
    whole = model.item_source.encode.encode_catalogue(model.item_llm, model.embed_items, show=False)
    monkeypatch.setattr("hllm_torchrec.models.item_encoder.CATALOGUE_TOKENS", 20)
    model.item_llm.train()
    encoded = model.item_source.encode.work.tokens
    chunked = model.item_source.encode.encode_catalogue(model.item_llm, model.embed_items, show=False)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    assert model.item_llm.training
    lengths = fixtures.token_store().lengths
    assert model.item_source.encode.work.tokens - encoded == lengths.sum() + len(lengths)
    ids = torch.tensor([5, 0, 4])
    assert model.item_source.encode.costs(ids).tolist() == (lengths[ids.numpy()] + 1).tolist()


def test_dense_item_vectors_are_added_to_the_item() -> None:
    cfg = config("late", weight=0.0)
    vectors = np.random.default_rng(0).normal(size=(fixtures.ITEMS + 1, 3)).astype(np.float32)
    torch.manual_seed(0)
    tables = fixtures.recipe(cfg).tables(fixtures.dataset())
    model = build_model(cfg, tables, base_rate=0.4, vector_width=3).eval()
    model.item_source = LiveItems(model.item_llm, ItemEncoder(fixtures.token_store(), torch.device("cpu")))
    collate = fixtures.collator(cfg)
    collate.item_vectors = vectors
    batch = collate(some_pieces(), 0, 0)
    assert model.project_vectors is not None
    before = model(batch).logits
    # The same model with W v folded into the ID table, and no vectors.
    with torch.no_grad():
        assert model.features.tables is not None
        folded = torch.from_numpy(vectors) @ model.project_vectors.weight.T
        model.features.tables.embedding_bags["item_id"].weight += folded
        model.project_vectors.weight.zero_()
    torch.testing.assert_close(model(batch).logits, before, rtol=1e-5, atol=1e-5)


def test_the_value_head_learns_the_ratings_that_are_known() -> None:
    cfg = config("late", weight=0.0, objective={"value_weight": 0.3})
    model = fixtures.model(cfg)
    batch, output = run(model, cfg, some_pieces())
    batch.target_values[:3] = torch.nan
    unknown = model(batch)
    assert output.value_error is not None and unknown.value_error is not None
    assert 0 < unknown.value_error < output.value_error
    unknown.value_error.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert fixtures.model(config("late", weight=0.0)).value_head is None


def test_training_starts_at_the_base_rate() -> None:
    cfg = config("late")
    built = build_model(cfg, fixtures.recipe(cfg).tables(fixtures.dataset()), base_rate=0.2)
    assert torch.sigmoid(built.head.out.bias).item() == pytest.approx(0.2)
