"""Invented samples in the published formats: ten of HLLM-Creator's table, five of LaMP by default."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TOPICS = ("tea", "chess", "sailing", "opera", "roses")


def creator_rows() -> list[dict[str, Any]]:
    """Ten rows of eight users."""
    rows = []
    for i in range(10):
        topic = TOPICS[i % 5]
        ids = [f"b{(i % 8) * 3 + k}" for k in range(4)]
        rows.append(
            {
                "user_profile": json.dumps({"long": topic}),
                "original_title": f"A book of {topic}",
                "original_description": f"All about {topic}, volume {i}.",
                "prompt1": "Write for ",
                "prompt2": ".",
                "response": f"{topic}: a book for you, volume {i}",
                "title_list": [f"Story {one}" for one in ids],
                "item_id_list": ids,
            }
        )
    return rows


def write_creator(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write the rows as Parquet."""
    pq.write_table(pa.Table.from_pylist(creator_rows() if rows is None else rows), path)
    return path


def lamp_files(folder: Path, name: str, task: str = "LaMP-4", count: int = 5) -> tuple[Path, Path]:
    """Write files of questions and outputs; returns their paths."""
    text = {"LaMP-4": "text", "LaMP-5": "abstract"}[task]
    questions = [
        {
            "id": f"{i}0",
            "input": f"Generate a headline for the following article: News of {TOPICS[i % 5]}: part {i}.",
            "profile": [
                {"id": f"{name}{i}{k}", "title": f"{TOPICS[i % 5]} {k}", text: f"Text {k}", "date": f"201{9 - k}-01-01"}
                for k in range(4)
            ],
        }
        for i in range(count)
    ]
    golds = [{"id": f"{i}0", "output": f"{TOPICS[i % 5]} today"} for i in range(count)]
    asked, given = folder / f"{name}_questions.json", folder / f"{name}_outputs.json"
    asked.write_text(json.dumps(questions))
    given.write_text(json.dumps({"task": task.replace("-", "_"), "golds": golds}))
    return asked, given
