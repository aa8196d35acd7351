"""Evaluation of a run on texts: gain that remains with clusters, retrieval of users, ROUGE, diversity."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from hllm_torchrec.creative.metrics import summarize
from hllm_torchrec.creative.text_metrics import distinct, diversity, rouge_l, rouge_n
from hllm_torchrec.creative.titles import Creatives
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.creative_scores import CreativeScores, creative_vectors
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.evaluation.user_retrieval import rank_metrics, user_ranks
from hllm_torchrec.launch import cli
from tests.helpers.title_fixtures import world


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def test_overlap_is_that_of_the_definitions() -> None:
    text, reference = "the cat sat on the mat", "The cat on a mat!"
    assert rouge_n(text, reference) == pytest.approx(2 * 4 / (6 + 5))  # the, cat, on, mat
    assert rouge_n(text, reference, 2) == pytest.approx(2 * 1 / (5 + 4))  # the cat
    assert rouge_l(text, reference) == pytest.approx(2 * 4 / (6 + 5))
    assert rouge_l("b a", "a b") == 0.5 and rouge_n("b a", "a b") == 1.0
    assert rouge_n("", reference) == rouge_l(text, "!") == rouge_l("x", "y") == 0.0
    assert rouge_l("Müller über alles", "MÜLLER ALLES") == pytest.approx(0.8)


def test_diversity_is_that_of_each_items_titles() -> None:
    items = ["a"] * 4 + ["b"] * 2 + ["c"]
    texts = ["x y", "x y", "x y", "x z", "q", "r", "alone"]
    found = diversity(items, [-1, 0, 1, 2, -1, 0, -1], texts)
    assert found["most_frequent"] == pytest.approx((2 / 3 + 1) / 2) and found["equal_to_null"] == pytest.approx(1 / 3)
    assert found["distinct_1"] == pytest.approx((3 / 6 + 1) / 2) and found["distinct_2"] == pytest.approx(2 / 3)
    assert math.isnan(distinct([], 1)) and math.isnan(diversity(["a"], [-1], ["x"])["most_frequent"])


def test_what_is_kept_is_all_for_the_users_own_vectors_and_nothing_for_null() -> None:
    random = np.random.default_rng(0)
    right, gap = random.random(60), random.random(60)
    nll = {"right": right, "null": right + gap, "cluster_9": right, "cluster_1": right + gap}
    nll["cluster_4"] = right + gap * np.repeat([0.2, 0.6], 30)
    rows, users = np.arange(60), np.repeat(np.arange(20), 3)
    kept = summarize(CreativeScores(rows, users, np.ones(60, np.int64), nll))["kept"]
    assert kept["cluster_9"] == {"share": 1.0, "interval": [1.0, 1.0]} and kept["cluster_1"]["share"] == 0.0
    low, high = kept["cluster_4"]["interval"]
    assert 0.4 < low < kept["cluster_4"]["share"] < high < 0.8
    assert kept["cluster_4"]["share"] == pytest.approx(1 - (gap * np.repeat([0.2, 0.6], 30)).sum() / gap.sum())


def test_the_rank_of_a_user_is_that_of_the_likelihood_with_each_user() -> None:
    """All users are candidates, each with one vector, so that the draws do not matter."""
    loaded = load_run(world() / "run", "best", init_distributed())
    hllm = loaded.experiment.hllm.eval()
    with loaded.weights:
        vectors = creative_vectors(loaded.experiment, "train")
        known = np.flatnonzero(vectors.known)
        users, first = np.unique(vectors.user_ids[known], return_index=True)
        of_user = vectors.vectors[torch.from_numpy(known[first])] * 3
        vectors.vectors[torch.from_numpy(known)] = of_user[np.searchsorted(users, vectors.user_ids[known])]
        ranks, candidates = user_ranks(loaded.experiment, vectors, 3, others=99)
        assert candidates == users.size > 5
        for place, creative in enumerate(known[np.linspace(0, known.size - 1, 3).astype(np.int64)]):
            texts = vectors.loader.tokens.gather(np.full(users.size, creative))
            with torch.no_grad():
                nll = hllm.score_texts(of_user, torch.zeros(users.size, dtype=torch.bool), texts)
            own = nll[users == vectors.user_ids[creative]]
            assert ranks[place] == 1 + int((nll < own).sum())
        tied, _ = user_ranks(loaded.experiment, replace(vectors, vectors=vectors.vectors * 0), 2, others=4)
    assert np.ptp(ranks) > 0 and tied.tolist() == [3.0] * 2
    assert rank_metrics(np.array([1.0, 1.5, 3.0]), 5)["recall_1"] == pytest.approx(0.5)


def test_a_run_is_evaluated_with_clusters_titles_users_and_texts(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--clusters", str(world() / "clusters"), "--titles", str(world() / "titles"), "--users", "5"]
    line = ["creatives", "evaluate", "--run", str(world() / "run"), *given, "--write", "4"]
    capsys.readouterr()
    assert cli.main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    nll = found["nll"]
    assert found["kept"]["cluster_3"]["share"] == pytest.approx(
        (nll["null"] - nll["cluster_3"]) / (nll["null"] - nll["right"])
    )
    assert found["users_among"]["creatives"] == 5 and 0 <= found["users_among"]["recall_1"] <= 1
    conditions = found["written"]["conditions"]
    assert conditions.keys() == {"right", "null", "cluster_3"} and conditions["null"]["equal_to_null"] == 1.0
    titles = Creatives.open(world() / "titles").titles
    replaced = sum(titles["fallback"].to_pylist())
    assert found["titles"]["titles"] == 120 and found["titles"]["fallbacks"] == replaced / 120 < 0.05
    destroy_distributed()
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert (
        "kept by cluster_3" in said and "of the right user among" in said and "ROUGE-L" in said and "distinct-2" in said
    )
