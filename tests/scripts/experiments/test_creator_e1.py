"""`creator_e1`: candidate texts get the same likelihoods as texts of a table; the baseline of counts is correct."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hllm_torchrec.config.creative import CreativeConfig
from hllm_torchrec.creative.template import TemplateRule, write_by_template
from hllm_torchrec.data.creative_table import CreativeTable, split_by_user, write_table
from hllm_torchrec.data.creative_tokens import CreativeTokenizer
from hllm_torchrec.data.split import SPLITS
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.creative_scores import creative_vectors, score_creatives
from hllm_torchrec.modules.creative.soft_prompt import SoftPrompt
from hllm_torchrec.training.trainer_setup import build_trainer
from tests.helpers import creative_fixtures
from tests.helpers.scripts import bench_module
from tests.helpers.training_fixtures import config

creator_e1, creator_ease, creator_tables = map(bench_module, ("creator_e1", "creator_ease", "creator_tables"))


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def test_candidates_are_scored_as_the_texts_are(tmp_path: Path) -> None:
    dataset = creative_fixtures.shop()
    rows, _ = write_by_template(dataset, TemplateRule(least=1, template="{value}"))
    of_row = list(split_by_user(rows["raw_user_id"].to_pylist(), (0.5, 0.25, 0.25)))
    write_table(dataset, "values", {split: rows.filter([one == split for one in of_row]) for split in SPLITS})
    own = creative_fixtures.settings(creative__data="values", creative__losses__match="0")
    experiment = build_trainer(config(tmp_path, **own), init_distributed()).experiment
    known = creative_vectors(experiment, "test")
    part, chosen = known.loader.part, np.arange(len(known.loader))
    choices = creator_e1.Choices(experiment, part, np.asarray(known.loader.tokens.rows))
    right = choices.nll(experiment, known.vectors, torch.from_numpy(~known.known))
    expected = score_creatives(experiment, "test", ("right",), vectors=known).nll["right"]
    np.testing.assert_allclose(right[choices.is_right], expected, rtol=1e-4)
    # The most likely candidate of each text, by a loop.
    hits = [float(right[(choices.owner == n) & choices.is_right][0] == right[choices.owner == n].min()) for n in chosen]
    np.testing.assert_allclose(choices.accuracy(right), hits)
    nats, accuracy = creator_e1.count_table(part, choices)  # counts of the very texts that are scored
    assert nats.shape == accuracy.shape == (chosen.size,) and nats.mean() < np.log(4) and accuracy.mean() > 0.5
    found = creator_e1.differences(
        {"right": nats, "null": nats + 0.5, "count table": nats, "shuffled": nats + 1}, known.user_ids
    )
    assert found["null - right"] == pytest.approx([0.5, 0.5, 0.5])


def test_clusters_keep_what_their_centers_keep_and_one_cluster_is_the_mean() -> None:
    vectors = torch.tensor([[0.0, 90.0], [1.0, -90.0], [10.0, 90.0], [11.0, -90.0]])
    tokens = SoftPrompt(2, 3)
    tokens.project.weight.data[:, 1] = 0.0  # the writer does not read the second dimension
    two = creator_e1.centers(vectors, vectors[[3, 0]], 2, tokens)
    torch.testing.assert_close(two, torch.tensor([[10.5, 0.0], [0.5, 0.0]]))
    torch.testing.assert_close(creator_e1.centers(vectors, vectors[:1], 1, tokens), vectors.mean(0)[None])
    medoids = creator_e1.centers(vectors, vectors[[3, 0]], 2, tokens, is_medoid=True)
    assert all(any(torch.equal(one, vector) for vector in vectors) for one in medoids) and medoids[0, 0] >= 10
    nats = {"null": np.array([2.0, 4.0]), "right": np.array([1.0, 1.0]), "cluster 2": np.array([1.0, 2.0])}
    assert creator_e1.kept(nats) == {"cluster 2": pytest.approx(0.75)}


def test_histories_as_texts_and_next_films_are_of_strictly_earlier_likes() -> None:
    dataset = creative_fixtures.shop()
    creator_tables.add_history(dataset, "lines", "history", ("title", "brand"))
    creator_tables.write_next(dataset, "next", ("title", "brand"))
    creator_tables.add_interests(dataset, "lines", "interests")
    titles, brands = (["", *dataset.text([name])[name].to_pylist()] for name in ("title", "brand"))

    def liked_before(user: int, second: int) -> list[str]:
        events = dataset.user_events(user)
        before = events.item_ids[(events.labels == 1) & (events.timestamps < second)]
        return [f"{titles[item]} ({brands[item]})" for item in before]

    old, new, following = (CreativeTable.open(dataset, name).part("train") for name in ("lines", "history", "next"))
    assert new.rows["response"].equals(old.rows["response"])
    for row, profile in enumerate(new.rows["profile"].to_pylist()):
        assert profile == "; ".join(liked_before(int(new.user_ids[row]), int(new.timestamps[row]))[-20:])
    interests = CreativeTable.open(dataset, "interests").part("train").rows["profile"].to_pylist()
    # What the rule names is an interest, unless it is crowded out by values that the film does not have.
    named = [text.split(", for fans")[0] in profile.split(", ") for text, profile in
             zip(old.rows["response"].to_pylist(), interests, strict=True)]  # fmt: skip
    assert np.mean(named) > 0.9
    assert len(following) > 20
    for row, text in enumerate(following.rows["response"].to_pylist()):
        item = following.item_ids[row]
        assert text == f"{titles[item]} ({brands[item]})"
        assert len(liked_before(int(following.user_ids[row]), int(following.timestamps[row]))) >= 5


def test_a_film_of_ones_own_taste_is_less_surprising_to_ease_than_to_another_users() -> None:
    liked = np.zeros((40, 9))
    liked[:20, 1:5], liked[20:, 5:9] = 1, 1  # two kinds of users
    weights = creator_ease.ease_weights(liked, 1.0)
    assert weights[1, 2] > 0.2 and weights[1, 5] == pytest.approx(0, abs=1e-9) and not np.diag(weights).any()
    history = np.zeros((2, 9))
    history[:, 1:3] = 1
    found = creator_ease.nats(10 * history @ weights, history, np.array([3, 6]))
    assert found[0] < np.log(6) < found[1]  # 6 films are left, and the unknown item is none
    uniform = creator_ease.nats(np.zeros((2, 9)), history, np.array([3, 1]))  # film 1 is in the history: it stays
    np.testing.assert_allclose(uniform, np.log([6, 7]))


def test_words_of_the_catalogue_are_one_token_each_and_come_back(tmp_path: Path) -> None:
    dataset = creative_fixtures.shop()
    size = creator_tables.word_tokenizer(dataset, tmp_path)
    tokenizer = CreativeTokenizer(CreativeConfig(tokenizer=str(tmp_path), prompt="{title} ({brand}){user}"))
    titles = dataset.text(["title"])["title"].to_pylist()[:20]
    for title, ids in zip(titles, tokenizer.responses(titles), strict=True):
        assert len(ids) == len(title.split()) + 1 and max(ids) < size
        assert tokenizer.decode(ids) == title
