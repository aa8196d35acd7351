import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hllm_torchrec.evaluation.model_comparison import compare
from hllm_torchrec.evaluation.report import read_training_log, write_report
from hllm_torchrec.evaluation.sanity_checks import metric_warnings

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = '<script>alert("x")</script> $\\frac$ & _name'
SECTIONS = {
    "Warnings",
    "Models",
    "Paired differences",
    "Training",
    "Order and calibration",
    "AUC over time",
    "AUC by slice",
    "Retrieval",
    "Configuration",
    "Provenance",
}


class Page(HTMLParser):
    """Checks that tags nest and collects what the tests ask for."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.labels: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(tag, dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._attributes(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def _attributes(self, tag: str, attributes: dict[str, str | None]) -> None:
        if attributes.get("id"):
            self.ids.append(str(attributes["id"]))
        self.references += re.findall(r"url\((.*?)\)", " ".join(str(value) for value in attributes.values()))
        self.references += [str(value) for name, value in attributes.items() if name in ("href", "src")]
        if tag == "svg":
            assert attributes["role"] == "img"
            self.labels.append(str(attributes["aria-label"]))


def further_tasks(labels: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Columns of a like, defined where the label is 1, and of seconds."""
    like = (np.arange(300) % 3 == 0).astype(np.float32)
    scores, seconds = random.normal(size=300) + like, random.random(300)
    return {
        "label_like": np.where(labels > 0, like, np.nan),
        "score_like": scores,
        "probability_like": 1 / (1 + np.exp(-scores)),
        "label_watch": np.arange(300) % 7,
        "score_watch": seconds,
        "prediction_watch": 7 * seconds,
    }


def write_metrics(
    run_dir: Path, names: list[str], *, days: int = 0, tasks: bool = False, **extra: Any
) -> dict[str, Any]:
    """Metrics of models on 300 exposures of 20 users; with days, their times too, with tasks, a like and seconds."""
    random = np.random.default_rng(0)
    labels = (random.random(300) < 0.5).astype(np.float32)
    directories = {}
    for index, name in enumerate(names):
        scores = (random.normal(size=300) + labels).astype(np.float32)
        directories[name] = run_dir / f"model-{index}"
        directories[name].mkdir(parents=True)
        values = {
            "user_id": np.arange(300) % 20,
            "position": np.arange(300) // 20,
            "item_id": np.ones(300, np.int64),
            "label": labels,
            "score": scores,
            "probability": 1 / (1 + np.exp(-scores)) if index != 1 else pa.nulls(300, pa.float32()),
            "history_length": np.arange(300) % 60,
            "item_is_cold": np.arange(300) % 9 == 0,
        }
        values |= further_tasks(labels, random) if tasks else {}
        if days:
            values["timestamp"] = 1_700_000_000 + np.arange(300) * 86_400 * days // 300
        pq.write_table(pa.table(values), directories[name] / "part-0.parquet")
    metrics = compare(directories, draws=20) | {"retrieval": None, "provenance": {}} | extra
    metrics["cautions"] = metric_warnings(metrics) if days else []
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    return metrics


def write_log(run_dir: Path, lines: Sequence[dict[str, Any] | str]) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (run_dir / "log.jsonl").write_text("\n".join(texts))


def training_lines(steps: int = 100) -> list[dict[str, Any] | str]:
    lines: list[dict[str, Any] | str] = [
        {
            "event": "step",
            "step": step,
            "loss": 2 / step,
            "loss_cls": 1 / step,
            "loss_gen": 1 / step,
            "lr": 1e-3,
        }
        for step in range(1, steps + 1)
    ]
    evaluations = [{"event": "eval", "step": step, "split": "valid", "auc": 0.7 + step / 1e4} for step in (50, 100)]
    return [{"event": "stage", "stage": "warm-up"}, *lines, *evaluations]


def report(run_dir: Path) -> tuple[str, Page]:
    text = write_report(run_dir).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("full")
    retrieval = {"hllm": {"rows": 20, "recall@10": 0.125}, "popularity": {"rows": 20, "recall@10": 0.0625}}
    provenance = {"versions": {"torch": "2.13.0"}, "seed": 1}
    write_metrics(run_dir, ["hllm", "item mean", HOSTILE], days=6, retrieval=retrieval, provenance=provenance)
    write_log(run_dir, training_lines())
    (run_dir / "config.yaml").write_text(f"name: '{HOSTILE}'\n")
    return run_dir


@pytest.fixture(scope="module")
def full_page(full_run: Path) -> tuple[str, Page]:
    return report(full_run)


@pytest.mark.slow
def test_a_full_run_has_every_section_and_figure(full_page: tuple[str, Page]) -> None:
    text, page = full_page
    assert set(page.texts["h2"]) == SECTIONS
    assert len(page.labels) == 8
    assert any(label.startswith("AUC with 95% intervals of every model over 7 days") for label in page.labels)
    assert any("Only 20 users" in warning for warning in page.texts["li"])
    assert any(warning.startswith("Tiny slices") for warning in page.texts["li"])
    assert all(page.labels)
    assert len(text) < 1_000_000


def test_the_page_needs_nothing_from_outside(full_page: tuple[str, Page]) -> None:
    text, page = full_page
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "http" not in text and "@import" not in text
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)


def test_ids_are_unique_and_every_reference_has_its_target(full_page: tuple[str, Page]) -> None:
    page = full_page[1]
    assert len(set(page.ids)) == len(page.ids)
    assert {reference[1:] for reference in page.references} <= set(page.ids)


def test_every_text_is_escaped(full_page: tuple[str, Page]) -> None:
    text, page = full_page
    assert "<script" not in text
    assert HOSTILE in page.texts["td"] and HOSTILE in page.texts["th"]
    assert HOSTILE in page.texts["pre"][0]


def test_the_tables_show_the_numbers_of_metrics_json(full_run: Path, full_page: tuple[str, Page]) -> None:
    metrics = json.loads((full_run / "metrics.json").read_text())
    page = full_page[1]
    cells = page.texts["td"]
    for model in metrics["models"].values():
        assert f"{model['auc']:.4f}" in cells
        assert f"[{model['auc_low']:.4f}, {model['auc_high']:.4f}]" in cells
        assert f"[{model['bootstrap_low']:.4f}, {model['bootstrap_high']:.4f}]" in cells
        for key in ("gauc", "gauc_user_weighted", "pr_auc"):
            assert f"{model[key]:.4f}" in cells
        assert {f"{recall:.4f}" for recall in model["recall_at_precision"].values()} <= set(cells)
    for pair in metrics["paired"].values():
        assert f"{pair['difference']:+.4f}" in cells
        assert f"[{pair['delong_low']:+.4f}, {pair['delong_high']:+.4f}]" in cells
    assert {
        "cold items",
        "history 0",
        "history 10-49",
        "0.1250",
        "0.0625",
        "versions.torch",
        "2.13.0",
    } <= set(cells)
    assert "history 200+" not in cells  # no rows
    assert "test split: 300 exposures of 20 users" in page.texts["p"]
    assert any("Best valid AUC 0.7100 at step 100." in text for text in page.texts["p"])


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(full_run: Path, full_page: tuple[str, Page]) -> None:
    assert report(full_run)[0] == full_page[0]
    assert not list(full_run.glob("*.tmp"))


def test_a_run_with_one_model_and_no_log_leaves_sections_out(tmp_path: Path) -> None:
    write_metrics(tmp_path, ["hllm"])
    _, page = report(tmp_path)
    assert set(page.texts["h2"]) == {"Models", "Order and calibration", "AUC by slice"}


def test_every_task_has_a_section(tmp_path: Path) -> None:
    tasks = write_metrics(tmp_path, ["hllm", "b"], tasks=True)["tasks"]
    text, page = report(tmp_path)
    assert {"Task like", "Task watch"} <= set(page.texts["h2"])
    assert f"{tasks['like']['rows']:,} exposures, those where the label of the task is defined." in page.texts["p"]
    like, watch = text.partition("Task like")[2].split("Task watch")
    watch = watch.partition("<h2>")[0]
    for model in tasks["like"]["models"].values():
        assert f"{model['auc']:.4f}" in like and f"{model['log_loss']:.4f}" in like
    assert f"{tasks['like']['paired']['b']['difference']:+.4f}" in like
    for model in tasks["watch"]["models"].values():
        assert all(f"<td>{model[name]:.4f}</td>" in watch for name in ("mae", "rmse", "spearman", "xauc"))


def test_metrics_of_the_first_schema_are_shown(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path, ["hllm", "b"])
    metrics["schema_version"] = 1
    for block in metrics["models"].values():
        for key in ("pr_auc", "recall_at_precision", "gauc_user_weighted", "clustered_low", "clustered_high"):
            del block[key]
    for key in ("cautions", "weighted", "exposures"):
        del metrics[key]
    for curves in metrics["curves"].values():
        del curves["pr"]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    _, page = report(tmp_path)
    assert set(page.texts["h2"]) == {"Models", "Paired differences", "Order and calibration", "AUC by slice"}


def test_the_verdict_of_the_gate_leads(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path, ["hllm"]) | {"gate": {"text": "FAIL: AUC of hllm"}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    text, page = report(tmp_path)
    assert "Regression gate: FAIL: AUC of hllm." in page.texts["p"]
    assert text.index("Regression gate") < text.index("<h2>")


def test_a_run_that_was_not_evaluated_shows_its_training(tmp_path: Path) -> None:
    write_log(tmp_path, training_lines())
    _, page = report(tmp_path)
    assert set(page.texts["h2"]) == {"Training"}
    assert len(page.labels) == 2


def test_retrieval_of_one_model_may_be_flat(tmp_path: Path) -> None:
    write_metrics(tmp_path, ["hllm"], retrieval={"rows": 20, "mrr": None, "ndcg@10": 0.0525})
    _, page = report(tmp_path)
    assert {"0.0525", "n/a", "20"} <= set(page.texts["td"])


def test_metrics_of_one_class_are_shown_as_undefined(tmp_path: Path) -> None:
    write_metrics(tmp_path, ["a", "b"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for model in metrics["models"].values():
        for key in ("auc", "auc_low", "auc_high", "gauc", "normalized_entropy", "calibration"):
            model[key] = None
        model["slices"] = {"item_cold": {"rows": 3, "positives": 3, "auc": None, "auc_low": None, "auc_high": None}}
    metrics["paired"]["b"] = dict.fromkeys(metrics["paired"]["b"])
    metrics["curves"]["a"]["roc"] = {"false_positive_rate": [], "true_positive_rate": []}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    _, page = report(tmp_path)
    assert page.texts["td"].count("n/a") >= 10


def test_lines_that_cannot_be_read_are_counted_on_the_page(tmp_path: Path) -> None:
    write_log(tmp_path, [*training_lines(3), "[1, 2]", '{"step": 4}', '{"event": "step", "st'])
    assert read_training_log(tmp_path / "log.jsonl").unreadable == [7, 8, 9]
    _, page = report(tmp_path)
    assert any("Lines of log.jsonl that could not be read: 3 (line 7, 8, 9)" in text for text in page.texts["p"])


def test_a_resumed_runs_repeated_steps_count_once_and_the_last_one_wins(tmp_path: Path) -> None:
    write_log(tmp_path, [{"event": "step", "step": step, "loss": loss} for step, loss in [(1, 3), (2, 9), (2, 2)]])
    log = read_training_log(tmp_path / "log.jsonl")
    assert {step: line["loss"] for step, line in log.steps.items()} == {1: 3, 2: 2}


def test_a_loss_that_became_nan_or_is_not_in_use_does_not_stop_the_report(tmp_path: Path) -> None:
    lines = [{"event": "step", "step": n, "loss": 1.0 if n < 4 else float("nan"), "loss_gen": 0.0} for n in range(8)]
    write_log(tmp_path, lines)
    _, page = report(tmp_path)
    assert page.labels == ["Training loss over steps"]


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has neither metrics.json nor a log.jsonl with steps; train or evaluate"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": 9}', "metrics.json has schema_version 9, this program reads 1, 2; evaluate again"),
        ("[]", "metrics.json has schema_version None"),
        ('{"schema_', "metrics.json is not JSON .*; evaluate again"),
    ],
)
def test_a_metrics_json_of_another_kind_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "place", ["rows", "models.a.auc_low", "models.a.gauc_users", "models.a.slices.item_cold.auc", "paired.b.delong_p"]
)
def test_a_field_that_is_missing_is_named_with_its_file(tmp_path: Path, place: str) -> None:
    block = metrics = write_metrics(tmp_path, ["a", "b"])
    *path, name = place.split(".")
    for key in path:
        block = block[key]
    del block[name]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match=rf"metrics.json: {re.escape(place)} is missing; evaluate again to replace it"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("models.hllm.auc", "high"),
        ("models.hllm", 3),
        ("models.hllm.log_loss", [1]),
        ("models", ["hllm"]),
        ("retrieval", ["x"]),
        ("provenance", ["x"]),
        ("curves", 7),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_its_file(place: str, value: Any, tmp_path: Path) -> None:
    content = write_metrics(tmp_path, ["hllm"])
    *above, last = place.split(".")
    block = content
    for name in above:
        block = block[name]
    block[last] = value
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    try:
        assert str(value) in write_report(tmp_path).read_text(), "shown as it is"
    except ValueError as error:
        assert f"{tmp_path / 'metrics.json'} has a value of a wrong type" in str(error)


def test_files_that_nest_too_deeply_are_refused_or_counted(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("[" * 100_000 + "\n")
    assert read_training_log(tmp_path / "log.jsonl").unreadable == [1]
    (tmp_path / "metrics.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"metrics\.json is not JSON .*; evaluate again"):
        write_report(tmp_path)
