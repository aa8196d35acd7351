"""`hllm create`: a title depends only on its item and cluster; a killed job can be continued; errors are one line."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hllm_torchrec.creative import generate
from hllm_torchrec.creative.clusters import Clusters
from hllm_torchrec.creative.filters import EMPTY, TextRules
from hllm_torchrec.creative.pairs import PairRule, match_scores
from hllm_torchrec.creative.title_writer import CUT, CreateOptions, TitleRequest, TitleWriter, batches
from hllm_torchrec.creative.titles import Creatives, written
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.run_loader import LoadedRun, load_run
from hllm_torchrec.launch import cli
from hllm_torchrec.launch import create as create_command
from hllm_torchrec.serving.scorer import Scorer
from hllm_torchrec.store.store import EmbeddingStore
from tests.helpers import creative_fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.title_fixtures import copied, create, done, world

SAMPLED = ("--temperature", "1", "--retries", "1")


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def loaded() -> LoadedRun:
    return load_run(world() / "run", "best", init_distributed())


def clusters() -> Clusters:
    return Clusters.open(world() / "clusters")


def writer(of: LoadedRun, **options: object) -> TitleWriter:
    chosen = replace(CreateOptions(rules=None), **options)  # type: ignore[arg-type]
    return TitleWriter(of.experiment, of.fingerprint, clusters().centers.centers, chosen)


def asked(of: TitleWriter, items: np.ndarray) -> list[TitleRequest]:
    prompts = zip(items.tolist(), of.prompts(items), strict=True)
    return [one for item, prompt in prompts for one in of.requests(item, prompt, [-1, 0, 1, 2])]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_title_depends_on_nothing_else_in_its_batch(temperature: float) -> None:
    of = loaded()
    with of.weights, of.experiment.evaluation_items():
        own = writer(of, temperature=temperature, top_k=0, top_p=1.0, retries=1)
        own.experiment.hllm.eval()
        every = asked(own, np.arange(1, 13))
        together = list(batches(every, 20))
        assert max(map(len, together)) > 4 and {one.key for batch in together for one in batch} == {
            one.key for one in every
        }
        found = {row["key"]: row for batch in together for row in own.write(batch)}
        for one in reversed(every[::4] + every[1::4]):
            assert own.write([one]) == [found[one.key]], one
    texts = [found[one.key]["text"] for one in every]
    assert len(set(texts)) > (30 if temperature else 1)
    cut = [row["reasons"] == CUT for row in found.values()]
    assert all(row["fallback"] == (row["reasons"] in (CUT, EMPTY)) for row in found.values())
    sources = creative_fixtures.shop().text(["title"])["title"].to_pylist()
    assert all(found[one.key]["text"] == sources[one.item - 1] for one in every if found[one.key]["fallback"])
    if temperature:
        assert 0 < sum(cut) < len(cut)


def test_batches_hold_prompts_of_equal_lengths_and_no_more_positions_than_they_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hllm_torchrec.creative.title_writer.BATCH_TOKENS", 150)
    of = loaded()
    every = asked(writer(of), np.arange(1, 41))
    found = list(batches(every, 10))
    for batch in found:
        lengths = {(len(one.prompt.before), len(one.prompt.after)) for one in batch}
        assert len(lengths) == 1 and (sum(lengths.pop()) + 10) * len(batch) <= 150
    assert sorted(one.key for batch in found for one in batch) == sorted(one.key for one in every)


def test_a_key_changes_with_all_that_a_title_depends_on_and_nothing_else() -> None:
    of, item = loaded(), np.array([3])
    (own,) = asked(writer(of), item)[1:2]
    same = [writer(of, pairs=PairRule(top=1)), writer(of, seed=5)]  # greedy: the seed draws nothing
    assert all(asked(one, item)[1].key == own.key for one in same)
    others = [
        writer(of, guidance=1.0),
        writer(of, rules=TextRules()),
        writer(of, temperature=1.0),
        writer(of, temperature=1.0, seed=5),
    ]
    others += [writer(of, source="brand"), TitleWriter(of.experiment, "w", clusters().centers.centers, same[0].options)]
    others += [TitleWriter(of.experiment, of.fingerprint, clusters().centers.centers + 1, same[0].options)]
    keys = [asked(one, item)[1].key for one in others] + [one.key for one in asked(same[0], np.array([3, 4]))]
    assert len(set(keys)) == len(keys) and keys.count(own.key) == 1


def test_filters_give_the_source_text_in_the_place_of_the_title() -> None:
    """Untrained titles have words that the item does not have; those of the prompt are supported."""
    of = loaded()
    with of.weights, of.experiment.evaluation_items():
        own = writer(of, rules=TextRules())
        own.experiment.hllm.eval()
        rows = own.write(asked(own, np.array([5])))
    source = creative_fixtures.shop().text(["title"])["title"][4].as_py()
    assert all(row["fallback"] and row["text"] == source and "do not have" in row["reasons"] for row in rows)


def written_on_ranks(world: str, output: str) -> int:
    """`hllm create --top 2` with SAMPLED for TEN items, within the process group of the ranks."""
    of = load_run(Path(world) / "run", "best", init_distributed())
    options = CreateOptions(PairRule(top=2), temperature=1.0, retries=1, rules=None)
    with of.weights:
        given = of, Clusters.open(Path(world) / "clusters"), Path(output), options
        return generate.create_titles(*given, np.arange(1, 11)).generated


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "titles").iterdir()}


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one_and_a_killed_job_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.txt").write_text("".join(f"s{n}\n" for n in range(10)))
    world()
    line = create(tmp_path / "one", *SAMPLED, "--top", "2", "--items", str(tmp_path / "ids.txt"))
    done(line)
    assert "30 titles of 10 items, 30 of them new" in capsys.readouterr().out
    whole = files_of(tmp_path / "one")
    monkeypatch.setattr(generate, "ROUND_TITLES", 4)
    kept = generate.write_round
    rounds = []

    def killed(path: Path, rows: list) -> None:
        kept(path, rows)
        rounds.append(len(rows))
        if len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(generate, "write_round", killed)
    line[line.index("--output") + 1] = str(tmp_path / "two")
    assert cli.main(line) == 130
    destroy_distributed()
    had = sum(rounds)
    assert 0 < had == len(written(tmp_path / "two")) < 30
    with pytest.raises(ValueError, match="no titles .* write them with `hllm create`"):
        Creatives.open(tmp_path / "two")
    (tmp_path / "two" / "rounds" / "half.part").write_bytes(b"PAR1")  # a write that was killed
    capsys.readouterr()
    done(line)
    assert f"{30 - had} of them new" in capsys.readouterr().out
    assert files_of(tmp_path / "two") == whole and not any((tmp_path / "two" / "rounds").iterdir())
    done(line)
    assert "30 titles of 10 items, 0 of them new" in capsys.readouterr().out
    assert run_ranks(written_on_ranks, 2, str(world()), str(tmp_path / "three")) == [30, 30]
    assert files_of(tmp_path / "three") == whole


def test_titles_of_some_items_leave_the_others_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    titles, _ = copied("titles", tmp_path), copied("clusters", tmp_path)
    before = Creatives.open(titles)
    (tmp_path / "ids.txt").write_text("s3\ns1\n")
    some = ["--items", str(tmp_path / "ids.txt")]
    done(create(titles, "--top", "2", *some))
    assert (titles / "titles" / "titles.arrow").read_bytes() == (
        world() / "titles" / "titles" / "titles.arrow"
    ).read_bytes()
    assert "6 titles of 2 items, 0 of them new" in capsys.readouterr().out
    assert cli.main(create(titles, "--top", "1", *some)) == 2
    assert "the titles of other items were written with other options: write those of all" in capsys.readouterr().err
    destroy_distributed()
    done(create(tmp_path / "few", *some))
    few = Creatives.open(tmp_path / "few")
    assert [len(few.of_item(item)) for item in ("s1", "s3", "s2")] == [4, 4, 0] and len(before) == 120


def test_titles_outlive_assignments_and_not_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users, titles, folder = copied("users", tmp_path), copied("titles", tmp_path), copied("clusters", tmp_path)
    cluster = ["cluster", "--users", str(users), "--output", str(folder)]
    person = Clusters.open(folder).users["raw_user_id"][0].as_py()
    with EmbeddingStore.open(users).writer() as writer:
        writer.delete([person])
        writer.commit()
    before = (titles / "titles" / "titles.arrow").read_bytes()
    done(cluster)
    assert Creatives.open(titles).get(person, "s1").cluster == -1  # read with the new assignment
    done([*cluster, "--refit", "--clusters", "2", "--least", "2"])
    assert "the centers have changed: write titles for the new clusters (hllm create)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="for other clusters than those in .*, which were fitted again: write titles"):
        Creatives.open(titles)
    line = create(titles, "--top", "2", clusters=str(folder))
    done(line)
    now = Creatives.open(titles)
    # Null titles depend on no center; items of equal texts share titles.
    keys = zip(now.titles["key"].to_pylist(), now.titles["cluster"].to_pylist(), strict=True)
    new = {key for key, cluster in keys if cluster >= 0}
    assert f"120 titles of 40 items, {len(new)} of them new" in capsys.readouterr().out and len(new) > 60
    assert {one.cluster for one in now.of_item("s1")} == {-1, 0, 1}
    # A damaged folder is refused, and written again once it is gone.
    (titles / "titles" / "items.arrow").write_bytes(before[:99])
    for refused in (line, ["creatives", "titles", "--creatives", str(titles), "--item", "s1"]):
        assert cli.main(refused) == 2
        assert "remove the folder and write the titles again (hllm create)" in capsys.readouterr().err
        destroy_distributed()
    shutil.rmtree(titles)
    done(line)
    assert len(Creatives.open(titles)) == 120


def test_pairs_are_those_that_the_scorer_ranks_first() -> None:
    """The match of an item with a user's own vector is the scorer's probability at the same moment."""
    run, users = world() / "run", EmbeddingStore.open(world() / "users").snapshot()
    of, dataset = loaded(), creative_fixtures.shop()
    raw = dataset.users["raw_user_id"].to_pylist()
    vectors, known = users.gather(raw)
    items = np.arange(1, dataset.num_items)
    with of.weights, of.experiment.evaluation_items():
        of.experiment.hllm.eval()
        found = match_scores(of.experiment, "head", vectors.numpy(), items)
        predicted = match_scores(of.experiment, "predictor", vectors.numpy(), items)
    assert found.shape == predicted.shape == (40, len(raw)) and np.ptp(predicted) > 0
    with Scorer.of_run(run) as scorer:
        # Of longer histories the scorer reads more events than a nightly job does.
        short = [user for user in range(1, len(raw) + 1) if 0 < len(dataset.user_events(user)) < 16]
        for user in short[:3]:
            history = dataset.user_events(user)
            midnight = (int(history.timestamps[-1]) // 86_400 + 1) * 86_400
            own = scorer.history(raw[user - 1], *(([*x]) for x in _columns(dataset, history)))
            wanted = torch.sigmoid(torch.from_numpy(scorer.score(own, items, midnight))).numpy()
            np.testing.assert_allclose(found[:, user - 1], wanted, atol=2e-3)  # the store's vectors are fp16
    rule = PairRule(top=3, above=0.4)
    assert rule.selected(np.array([0.1, 0.9, 0.5, 0.5, 0.5], np.float32)).tolist() == [1, 2, 3]
    assert rule.selected(np.array([0.1, 0.2, 0.3, 0.39, 0.4], np.float32)).tolist() == [4]
    assert PairRule("none").selected(np.full(3, np.nan, np.float32)).tolist() == [0, 1, 2]


def _columns(dataset, events):  # type: ignore[no-untyped-def]
    raw, names = dataset.items["raw_item_id"].to_pylist(), dataset.manifest["actions"]["names"]
    yield [raw[item - 1] for item in events.item_ids]
    yield events.timestamps
    yield events.labels
    yield [names.get(str(action)) for action in events.actions]


def test_what_does_not_fit_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of, new = loaded(), tmp_path / "new"
    facts = json.loads((copied("clusters", tmp_path) / "clusters.json").read_text())
    facts["source"]["weights"] = "another"
    (tmp_path / "clusters" / "clusters.json").write_text(json.dumps(facts))
    foreign, fitting = Clusters.open(tmp_path / "clusters"), clusters()
    plain, unscored = CreateOptions(), CreateOptions(PairRule("none", top=1))
    for said, given in {
        "--output .*: holds something else than titles; name a new folder": (fitting, tmp_path / "clusters", plain),
        "its users were embedded by another checkpoint than .*: embed them with": (foreign, new, plain),
        "scores no pairs: --top and --above need --match head or predictor": (fitting, new, unscored),
        "--source nothing: no text column of .*; it has title": (fitting, new, CreateOptions(source="nothing")),
    }.items():
        with pytest.raises(ValueError, match=said):
            generate.create_titles(of, *given)
    destroy_distributed()
    (tmp_path / "ids.txt").write_text("s3\nsx\n")
    for said, line in {
        "no clusters of users .*: choose their folder, or make them with `hllm cluster`": create(new, clusters="users"),
        "row 1: raw_item_id 'sx': not in ": create(new, "--items", str(tmp_path / "ids.txt")),
        "--top-p above 0": create(new, "--top-p", "0"),
    }.items():
        assert cli.main(line) == 2, line
        destroy_distributed()
        errors = [one for one in capsys.readouterr().err.splitlines() if "error:" in one]
        assert len(errors) == 1 and re.search(said, errors[0]), errors
    assert not new.exists()


@pytest.mark.parametrize(
    ("titles", "fallbacks", "equal", "last"),
    [
        (0, 0, None, "caution: there are no titles"),
        (30, 30, None, "caution: no title passes the rules: every title is the item's own text"),
        (30, 20, None, "caution: there are no generated titles for clusters: nothing is personal"),
        (30, 3, 1.0, "caution: all generated titles for clusters equal the item's title for everybody: nothing is "),
        (30, 3, 0.25, "25.0% of the generated titles for clusters equal the item's title for everybody"),
    ],
)
def test_the_last_line_says_how_personal_the_generated_titles_are(
    titles: int, fallbacks: int, equal: float | None, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = generate.CreateReport(10, 0, titles, titles, fallbacks, {}, equal)
    create_command._print(report, Path("titles"))
    assert capsys.readouterr().out.splitlines()[-1].startswith(last)
