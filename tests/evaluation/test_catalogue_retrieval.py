"""Generative models without text: the item space of features, other user encoders, protocols, one and two ranks."""

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.pieces import cut_into_pieces
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.catalogue_retrieval import catalogue_vectors, evaluate_retrieval
from hllm_torchrec.evaluation.retrieval_comparison import read_target_ranks
from hllm_torchrec.launch.evaluate import main as evaluate
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.modules.losses.objectives import Exclusion, info_nce
from hllm_torchrec.modules.losses.sampled_bce import sampled_bce
from tests.helpers import fixtures, naive_model, training_fixtures
from tests.helpers.distributed import run_ranks

RULE = "leave_one_out"
SHAPES: dict[str, dict[str, Any]] = {
    "llm": {**fixtures.USER, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2},
    "hstu": {"width": 8, "layers": 1, "heads": 2, "divide_by": 16, "time_of": "next"},
    "sasrec": {"width": 8, "layers": 1, "max_positions": 64},
    "ligr": {"width": 8, "layers": 1, "max_positions": 64},
}


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def config(output: Path, **settings: Any) -> Config:
    """A tiny ID-only generative run on the leave-one-out shop."""
    defaults = {
        "data__dataset": fixtures.dataset(RULE).root,
        "data__user_features": [],
        "data__numeric_features": [],
        "data__max_history": 64,
        "item_llm__enabled": False,
        "user__encoder": "sasrec",
        "user__shape": SHAPES["sasrec"],
        "objective__fusion": "none",
        "objective__positive_targets_only": False,
        "evaluation__protocol": "leave_one_out",
        "evaluation__ks": [1, 5, 20],
    }
    return training_fixtures.config(output, **(defaults | settings))


def id_only(**sections: Any) -> Config:
    sections = {"item_llm": {"enabled": False}, "data": {"item_features": ("genres",)}} | sections
    return fixtures.config(objective={"fusion": "none", "negatives": 6} | sections.pop("objective", {}), **sections)


# ----------------------------------------------------------------------------- the item space of features


@pytest.mark.parametrize("text", [False, True])
def test_items_are_compared_by_their_features_looked_up_in_the_same_call(text: bool) -> None:
    """Positives and negatives are P(E) + ID + genres, without action or time."""
    cfg = id_only(item_llm={"enabled": text}, objective={"fusion": "none", "negatives": 6, "item_space": "features"})
    cfg = replace(cfg, item_llm=fixtures.config().item_llm) if text else cfg
    model = fixtures.model(cfg)
    tables = model.features.tables
    assert tables is not None
    calls: list[int] = []
    tables.register_forward_hook(lambda *_: calls.append(1))
    batch = fixtures.collator(cfg, training=True)(list(fixtures.pieces("train")[1:5]), 0, 0)
    output = model(batch)
    assert calls == [1] and output.generative is not None and output.items is not None
    genres = fixtures.dataset().items["feature_genres"].to_pylist()
    expected = []
    for item in batch.unique_items.tolist():
        row = tables.embedding_bags["item_id"].weight[item]
        for genre in genres[item - 1]:
            row = row + tables.embedding_bags["genres"].weight[genre]
        expected.append(row)
    rows = torch.stack(expected)
    if text:
        rows = rows + model.project_item(model.embed_items(batch.unique_items))
    torch.testing.assert_close(output.items, rows, rtol=1e-4, atol=1e-5)
    h = model._encode_users(batch, model.item_embeddings(batch.unique_items))[0]
    direct = info_nce(
        h[batch.next_rows],
        rows[batch.next_index],
        rows[batch.negative_index],
        model.logit_scale(),
        target_ids=batch.next_items,
        negative_ids=batch.negative_items,
    )
    assert int(direct.count) == int(output.generative.count) > 10
    assert float(output.generative.effective_negatives) < float(direct.effective_negatives)
    model.mask_own_items = False
    unmasked = model(batch).generative
    assert unmasked is not None
    torch.testing.assert_close(unmasked.loss_sum, direct.loss_sum)
    model.mask_own_items = True
    weight = tables.embedding_bags["item_id"].weight
    (gradient,) = torch.autograd.grad(output.generative.loss_sum, [weight])
    negatives = set(batch.negative_items.tolist()) - set(batch.item_ids.tolist())
    assert negatives and all(bool(gradient[item].any()) for item in negatives), "negatives train their rows"


def test_id_dropout_leaves_the_compared_items_alone() -> None:
    cfg = id_only(data={"id_dropout": 0.9})
    batch = fixtures.collator(cfg, training=True)(list(fixtures.pieces("train")[1:5]), 0, 0)
    bags = batch.features["item_id"].to_dense()
    assert [bag.tolist() for bag in bags[-batch.unique_items.numel() :]] == [[i] for i in batch.unique_items.tolist()]
    assert sum(int(bag[0]) == 0 for bag in bags[: batch.item_ids.numel()]) > batch.item_ids.numel() // 2


def test_batches_of_evaluation_have_no_slots_for_items() -> None:
    cfg = id_only()
    batch = fixtures.collator(cfg)(list(fixtures.pieces("train")[1:3]), 0, 0)
    assert batch.features.stride() == batch.item_ids.numel()
    assert fixtures.model(cfg)(batch).generative is None


def catalogue(settings: Config) -> Tensor:
    experiment = build_experiment(settings, init_distributed())
    return catalogue_vectors(experiment)


def test_the_catalogue_is_embedded_alike_on_one_and_two_ranks(tmp_path: Path) -> None:
    settings = config(tmp_path)
    one = catalogue(settings)
    assert one.shape == (fixtures.ITEMS + 1, 8)
    experiment = build_experiment(settings, init_distributed())
    collator = experiment.loader("train", 4, training=True).collator
    batch = collator(list(fixtures.pieces("train", RULE)[1:3]), 0, 0)
    output = experiment.hllm.train()(batch)
    torch.testing.assert_close(output.items, one[batch.unique_items])
    for other in run_ranks(catalogue, 2, settings):
        torch.testing.assert_close(other, one)


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [pytest.param("llm", marks=pytest.mark.slow), "hstu", "sasrec", "ligr"])
def test_every_encoder_trains_and_its_loss_falls(encoder: str, tmp_path: Path) -> None:
    settings = config(
        tmp_path,
        user__encoder=encoder,
        user__shape=SHAPES[encoder],
        stages=[{"name": "ids", "epochs": 4}],
        evaluation__every=4,
        parallel__activation_checkpointing=encoder == "hstu",
    )
    trainer = training_fixtures.train(settings)
    losses = training_fixtures.losses(tmp_path)
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.02
    targets = sum(int((~np.isnan(p.labels[p.first_target :])).sum()) for p in fixtures.pieces("valid", RULE))
    assert trainer.metrics["retrieval_rows"] + trainer.metrics["without_history"] == targets > 10
    assert trainer.metrics["protocol"] == "leave_one_out" and trainer.metrics["mrr"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["hstu", "ligr"])
def test_one_rank_two_ranks_and_fsdp_train_alike(encoder: str, tmp_path: Path) -> None:
    def settings(name: str, batch_users: int, **more: Any) -> Config:
        own = {"user__encoder": encoder, "user__shape": SHAPES[encoder], "data__batch_users": batch_users}
        return config(tmp_path / name, **own, **more, stages=[{"name": "ids", "epochs": 2}], optim__lr=0.001)

    one = training_fixtures.train(settings("one", 4)).metrics
    for name, dense in (("ddp", "ddp"), ("fsdp", "fsdp")):
        found = run_ranks(training_fixtures.on_rank, 2, settings(name, 2, parallel__dense=dense))
        for rank in found:
            assert rank["metrics"]["mrr"] == pytest.approx(one["mrr"], rel=0.02)
        np.testing.assert_allclose(
            training_fixtures.losses(tmp_path / name), training_fixtures.losses(tmp_path / "one"), rtol=2e-3
        )


@pytest.mark.slow
def test_results_name_the_protocol_and_what_was_measured(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", evaluation__protocol="ml1m_hstu", data__train_part="train_and_valid")
    training_fixtures.train(settings)
    destroy_distributed()
    assert evaluate(["--run", str(tmp_path / "run"), "--checkpoint", "latest"]) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["retrieval"]
    assert found["protocol"] == "ml1m_hstu" and found["filter_seen"] is True and found["targets"] == "all"
    ranks = read_target_ranks(tmp_path / "run" / "retrieval" / "test").rank
    assert len(ranks) == found["rows"] and (ranks <= 5).mean() == pytest.approx(found["recall@5"])
    assert found["candidates"] == fixtures.ITEMS and 0 <= found["recall@5"] <= found["recall@20"] <= 1


def retrieval_of(settings: Config) -> dict[str, Any]:
    experiment = build_experiment(settings, init_distributed())
    return evaluate_retrieval(experiment, experiment.loader("test", 3))


@pytest.mark.slow
@pytest.mark.parametrize("positive", [False, True])
def test_targets_and_seen_items_are_by_option_and_two_ranks_agree(positive: bool, tmp_path: Path) -> None:
    settings = config(tmp_path, evaluation__protocol=None, objective__positive_targets_only=positive)
    one = retrieval_of(settings)
    labels = [p.labels[p.first_target :] for p in fixtures.pieces("test", RULE)]
    targets = np.concatenate(labels)
    wanted = int((targets == 1).sum()) if positive else int((~np.isnan(targets)).sum())
    assert one["rows"] + one["without_history"] == wanted
    unfiltered = retrieval_of(replace(settings, evaluation=replace(settings.evaluation, filter_seen=False)))
    assert unfiltered["mrr"] < one["mrr"] and unfiltered["filter_seen"] is False
    for other in run_ranks(retrieval_of, 2, settings):
        assert other == pytest.approx(one, abs=1e-6)


# ---------------------------------------------------------------------- other encoders in the ranking model


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["late", "early"])
@pytest.mark.parametrize("encoder", ["hstu", "sasrec", "ligr"])
def test_packed_exposures_equal_one_at_a_time_with_any_user_encoder(encoder: str, fusion: str) -> None:
    shape = SHAPES[encoder] | ({"time_of": "event", "window": 5, "divide_by": "length"} if encoder == "hstu" else {})
    cfg = naive_model.config(fusion, user={"encoder": encoder, "shape": shape}, data={"max_history": 64})
    model = fixtures.model(cfg)
    pieces = naive_model.some_pieces()[:4]
    with torch.no_grad():
        packed = naive_model.run(model, cfg, pieces)[1].logits
        singles = [
            naive_model.run(model, cfg, [naive_model.alone(p, t)])[1].logits
            for p in pieces
            for t in naive_model.exposures(p)
        ]
    assert packed.std() > 0.01
    torch.testing.assert_close(packed, torch.cat(singles), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------- protocols


def test_training_on_both_parts_has_every_event_but_the_last_as_target(tmp_path: Path) -> None:
    cfg = config(tmp_path, data__train_part="train_and_valid", evaluation__protocol=None, evaluation__every=9)
    loader = build_experiment(cfg, init_distributed()).loader("train", 4, training=True)
    found = sorted(int(i) for batch in loader.batches(0) for i in batch.next_items)
    tested = {p.user_id: p.item_ids[:-1] for p in fixtures.pieces("test", RULE)}
    trained = {p.user_id: p.item_ids for p in fixtures.pieces("train", RULE)}
    assert set(tested) < set(trained), "a user of few events has no test event"
    expected = sorted(int(i) for items in (trained | tested).values() for i in items[1:])
    assert found == expected
    assert sorted(loader.pieces.row[loader.pieces.group > 0].tolist()) != []


def test_a_protocol_on_another_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split by 'time'; evaluation.protocol leave_one_out needs one prepared with"):
        build_experiment(config(tmp_path, data__dataset=fixtures.dataset().root), init_distributed())


def test_stretches_of_evaluation_are_as_long_as_allowed() -> None:
    zero, lengths = np.zeros(3, np.int64), np.array([5, 20, 20])
    starts = np.array([4, 19, 2])
    plain = cut_into_pieces(zero, np.arange(3), lengths, starts, 8)
    filled = cut_into_pieces(zero, np.arange(3), lengths, starts, 8, extend_history=True)
    assert filled.start[:2].tolist() == [0, 12] and plain.start[:2].tolist() == [0, 15]
    assert np.array_equal(filled.start[2:], plain.start[2:])
    for pieces in (plain, filled):
        covered = [(r, e) for r, f, n in zip(pieces.row, pieces.first_target, pieces.end) for e in range(f, n)]
        assert sorted(covered) == [(r, e) for r in range(3) for e in range(starts[r], lengths[r])]


def test_next_times_are_those_of_the_events_that_follow() -> None:
    cfg = id_only()
    piece = fixtures.pieces("valid", RULE)[3]
    batch = fixtures.collator(cfg, RULE)([piece], 0, 0)
    visible = int(batch.query_visible[-1])
    assert batch.item_ids.numel() == visible == piece.first_target
    assert batch.next_times.tolist() == piece.timestamps[1 : visible + 1].tolist()


# ------------------------------------------------------------------------------------------ the binary loss


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_the_binary_loss_equals_its_definition_written_out(chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    h, positives, negatives = (
        torch.randn(n, 4, generator=generator, dtype=torch.float64, requires_grad=True) for n in (5, 5, 6)
    )
    scale = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    targets, drawn = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([5, 6, 7, 2, 9, 6])
    exclude = (torch.tensor([7, 9, 1, 6]), torch.tensor([0, 3, 4]), torch.tensor([0, 0, 0, 1, 1]))
    found = sampled_bce(
        h,
        positives,
        negatives,
        scale,
        target_ids=targets,
        negative_ids=drawn,
        exclude=Exclusion(*exclude),
        chunk_size=chunk_size,
    )
    seen = {0: {7, 9, 1}, 1: {6}}
    total, left = torch.zeros((), dtype=torch.float64), []
    for row in range(5):
        own = seen[int(exclude[2][row])] | {int(targets[row])}
        kept = [k for k, item in enumerate(drawn.tolist()) if item not in own]
        similar = scale * torch.cosine_similarity(h[row][None], negatives[kept])
        positive = scale * torch.cosine_similarity(h[row][None], positives[row][None])
        total = total - torch.log(torch.sigmoid(positive)).sum() - torch.log(1 - torch.sigmoid(similar)).mean()
        left.append(len(kept))
    torch.testing.assert_close(found.loss_sum, total)
    assert float(found.effective_negatives) == pytest.approx(np.mean(left))
    inputs = [h, positives, negatives, scale]
    torch.testing.assert_close(torch.autograd.grad(found.loss_sum, inputs), torch.autograd.grad(total, inputs))


def test_the_binary_loss_keeps_no_masks_for_its_backward_pass() -> None:
    x, ids = torch.randn(6, 2, requires_grad=True), torch.arange(6)
    found = sampled_bce(x, x, x[:5], torch.ones(1), target_ids=ids, negative_ids=ids[:5], chunk_size=2)
    masks = [one for one in gc.get_objects() if type(one) is Tensor and one.dtype == torch.bool and one.shape == (2, 5)]
    assert found.loss_sum.requires_grad and not masks


def test_the_binary_loss_without_negatives_is_an_error() -> None:
    x, ids = torch.ones(1, 2), torch.tensor([1])
    with pytest.raises(ValueError, match="got no negatives: sample at least one"):
        sampled_bce(x, x, x[:0], torch.ones(1), target_ids=ids, negative_ids=ids[:0])
    with pytest.raises(ValueError, match="chunk size is 0: must be at least 1"):
        sampled_bce(x, x, x, torch.ones(1), target_ids=ids, negative_ids=ids, chunk_size=0)
