import pytest

from hllm_torchrec.common.seconds import text_of
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.sources.registry import SOURCES
from hllm_torchrec.launch.prepare import main
from tests.helpers.source_files import (
    RATINGS,
    amazon_files,
    kuairec_files,
    movielens_1m_files,
    pixelrec_files,
    recbole_100k,
    write_csv,
)


def arguments(folder, source):
    """The command line for each source, on small files in its format."""
    if source == "ml-100k":
        return ["--path", recbole_100k(folder)]
    if source == "ml-1m":
        return ["--path", movielens_1m_files(folder)]
    if source == "pixelrec":
        interactions, items = pixelrec_files(folder)
        return ["--path", interactions, "--items", items]
    if source == "kuairec":
        return ["--path", kuairec_files(folder)]
    if source == "amazon":
        ratings = [(f"A{u}", f"B{i}", 1 + (u + i) % 5, 10**9 + 7 * u + i) for u in range(6) for i in range(6)]
        interactions, items = amazon_files(folder, ratings)
        return ["--path", interactions, "--items", items]
    write_csv(folder / "e.csv", [("u", "i"), *((user, item) for user, item, _, _ in RATINGS)])
    write_csv(folder / "i.csv", [("i", "name"), *((item, f"name {item}") for item in "1279")])
    events, items = "{path: e.csv, user: u, item: i}", "{path: i.csv, item: i, text: [name]}"
    (folder / "t.yaml").write_text(f"name: t\nevents: {events}\nitems: {items}\n")
    return ["--path", folder / "t.yaml"]


def run(*words):
    return main([str(word) for word in words])


@pytest.mark.parametrize("source", list(SOURCES))
def test_every_source_is_prepared_from_the_command_line(tmp_path, capsys, source):
    words = ["--source", source, *arguments(tmp_path, source), "--output", tmp_path / "out"]
    assert run(*words, "--split", "leave_one_out") == 0
    dataset = Dataset.open(tmp_path / "out")
    printed = capsys.readouterr().out
    assert f"{dataset.manifest['counts']['events']:,} events" in printed
    assert "test: " in printed


def test_dates_divide_the_events(tmp_path, capsys):
    folder = recbole_100k(tmp_path)
    words = ["--source", "ml-100k", "--path", folder, "--output", tmp_path / "out"]
    seconds = sorted(second for *_, second in RATINGS)
    first, second = seconds[len(seconds) // 3], seconds[2 * len(seconds) // 3]
    assert run(*words, "--train-until", text_of(first), "--valid-until", second) == 0
    manifest = Dataset.open(tmp_path / "out").manifest
    assert manifest["split"]["rule"] == "date" and manifest["split"]["cut_timestamps"] == [first, second]
    assert manifest["parts"]["train"]["events"] == sum(at < first for at in seconds)
    assert manifest["parts"]["test"]["events"] == sum(at >= second for at in seconds)
    with pytest.raises(SystemExit):
        run(*words, "--train-until", "yesterday")
    assert "--train-until: 'yesterday' is not a moment: write 2023-11-22" in capsys.readouterr().err


def test_options_reach_the_dataset(tmp_path):
    folder = recbole_100k(tmp_path, [*RATINGS, ("5", "404", 5, 880000000)])
    words = ["--source", "ml-100k", "--path", folder, "--output", tmp_path / "out"]
    words += ["--fractions", 0.6, 0.2, 0.2, "--bad-rows", "unknown_item=drop", "--min-events", 2]
    assert run(*words) == 0
    manifest = Dataset.open(tmp_path / "out").manifest
    assert manifest["split"]["fractions"] == [0.6, 0.2, 0.2]
    assert manifest["counts"]["dropped"] == {"outside_2_core": 1, "unknown_item": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "ml-1m"], "--path is missing: ml-1m cannot be fetched"),
        (["--source", "pixelrec", "--path", "x.csv"], "--items is missing: pixelrec needs"),
        (
            ["--source", "pixelrec", "--path", "x.csv", "--items", "y.csv"],
            "PixelRec: file not found: x.csv, y.csv",
        ),
        (["--source", "ml-1m", "--path", ".", "--items", "y.csv"], "--items belongs to pixelrec and amazon"),
        (["--source", "ml-1m", "--path", ".", "--time-unit", "seconds"], "--time-unit belongs to pixelrec"),
        (["--source", "table", "--path", "no.yaml"], "no.yaml: no such mapping file"),
        (["--source", "ml-100k", "--path", ".", "--fractions", "1", "1", "1"], "MovieLens-100k (neither"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert run(*words, "--output", "out") == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert lines[-1].startswith("hllm prepare: error: ")
    assert message in lines[-1]
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bad-rows", "typo=drop"], "--bad-rows typo=drop: no kind 'typo'; kinds: missing_id"),
        (["--bad-rows", "bad_time=maybe"], "policy bad_time='maybe': choose one of error, drop"),
        (["--fractions", "1", "1", "1"], "must be three shares"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, capsys, words, message):
    folder = recbole_100k(tmp_path)
    assert run("--source", "ml-100k", "--path", folder, "--output", tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words", ["--source netflix --output x", "--source ml-1m", "--nonsense"])
def test_an_unknown_argument_is_one_line_without_usage(capsys, words):
    with pytest.raises(SystemExit) as error:
        run(*words.split())
    assert error.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("hllm prepare: error: ")


def test_help_shows_examples_for_every_source(capsys):
    with pytest.raises(SystemExit) as error:
        run("--help")
    assert error.value.code == 0
    printed = capsys.readouterr().out
    for source in SOURCES:
        assert f"hllm prepare --source {source}" in printed
