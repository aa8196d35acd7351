"""Options and job of `hllm creatives build`: texts by a rule, by a language model, or by a custom writer."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, natural, positive, refuse_options_of_others

if TYPE_CHECKING:
    import pyarrow as pa

    from hllm_torchrec.creative.writing.pipeline import Built
    from hllm_torchrec.creative.writing.text_cosine import TextCosine
    from hllm_torchrec.creative.writing.writer import Writer
    from hllm_torchrec.data.dataset import Dataset

_TEMPLATE = ("feature", "recent", "template")
_ENDPOINT = ("base_url", "key_from", "at_once")
_BUDGET = ("max_requests", "max_tokens")
_SELECTION = ("facts", "history", "per_user", "users")
_PARAMETERS = ("answer_tokens", "temperature", "seed", "attempts")
_RULES = ("longest", "added_words", "support", "alike", "allowed")
_BY_MODEL = (*_SELECTION, *_PARAMETERS, *_RULES, "encoder", "least_cosine")
_OPTIONS = {
    "template": _TEMPLATE,
    "openai": ("model", "judge", *_ENDPOINT, *_BUDGET, *_BY_MODEL),
    "local": ("model", "judge", *_BY_MODEL),
    "module:Name": _BY_MODEL,
}
"""Options of each writer, in addition to those of all writers."""


def add_build_options(build: CommandParser) -> None:
    """Add the options of `build`. Options of single writers default to None, so that other writers can refuse them."""
    build.add_argument(
        "--writer",
        default="template",
        help="template (a rule, the default), openai (a server), local (a Hugging Face directory), or module:Name",
    )
    build.add_argument("--title", default="title", help="text column with an item's name (default: title)")
    build.add_argument(
        "--least", type=positive, default=5, help="minimum number of earlier likes for a text (default: 5)"
    )
    build.add_fractions(0.7, 0.1, 0.2, help="shares of the users in each part")
    rule = build.add_argument_group("writer template")
    rule.add_argument("--feature", help="item feature that a text stresses (default: genres)")
    rule.add_argument("--recent", type=positive, help="latest likes that the rule reads (default: 20)")
    rule.add_argument("--template", help="text (default: '{value}, for fans of {liked}')")
    model = build.add_argument_group("other writers")
    model.add_argument("--model", help="openai: the server's name of the model; local: its directory")
    model.add_argument("--facts", nargs="+", metavar="COLUMN", help="text columns with facts of an item (default: all)")
    model.add_argument("--history", type=positive, help="latest likes that the writer reads (default: 50)")
    model.add_argument("--per-user", type=natural, help="latest likes of a user to write for (default: 1; 0: all)")
    model.add_argument("--users", type=natural, help="number of users, drawn by --seed (default: 0, all)")
    model.add_argument("--answer-tokens", type=positive, help="maximum number of tokens of an answer (default: 512)")
    model.add_argument("--temperature", type=float, help="temperature of sampling; 0: greedy (default: 0.7)")
    model.add_argument("--seed", type=natural, help="seed of users and of sampling (default: 0)")
    model.add_argument(
        "--attempts", type=positive, help="answers to sample until one has the JSON asked for (default: 3)"
    )
    model.add_argument("--judge", metavar="MODEL", help="model of the same writer that must confirm each text twice")
    server = build.add_argument_group("writer openai")
    server.add_argument("--base-url", metavar="URL", help="address of the server, such as http://localhost:8000/v1")
    server.add_argument("--key-from", metavar="NAME", help="environment variable that holds the key (default: no key)")
    server.add_argument("--at-once", type=positive, help="number of concurrent requests (default: 4)")
    server.add_argument("--max-requests", type=positive, help="stop after this many requests; a rerun continues")
    server.add_argument("--max-tokens", type=positive, help="stop after this many tokens of prompts and answers")
    filters = build.add_argument_group("filters of texts by a model")
    filters.add_argument("--longest", type=positive, help="maximum number of characters of a text (default: 300)")
    filters.add_argument("--added-words", type=natural, help="maximum number of words not in the title (default: 10)")
    filters.add_argument(
        "--support", type=float, help="minimum share of content words that the facts contain (default: 1)"
    )
    filters.add_argument(
        "--allowed", type=Path, metavar="FILE", help="further words that a text may contain, one per line"
    )
    filters.add_argument("--encoder", metavar="DIR", help="sentence encoder (hllm fetch minilm) of --least-cosine")
    filters.add_argument("--least-cosine", type=float, help="minimum cosine of a text and the facts (default: 0.5)")
    filters.add_argument(
        "--alike",
        type=float,
        help="share of common words from which texts of an item are nearly equal (default: 0.9; 0: never)",
    )


def run_build(args: argparse.Namespace) -> None:
    """Write a table.

    Raises:
        ValueError: an option, the dataset or the writer's server is not usable.
        Preempted: the writer has reached a limit.
    """
    from hllm_torchrec.creative.writing.writer import check_writer
    from hllm_torchrec.data.creative_table import check_fractions, check_name, table_path
    from hllm_torchrec.data.dataset import Dataset

    check_writer(args.writer)
    _check(args)
    check_name(args.name)
    check_fractions(args.fractions)
    dataset = Dataset.open(args.dataset)
    if table_path(dataset, args.name).exists():
        raise ValueError(f"--name {args.name}: {table_path(dataset, args.name)} exists; choose another, or remove it")
    (_by_template if args.writer == "template" else _by_model)(args, dataset)


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options of another writer, and for values out of their range."""
    refuse_options_of_others(args, "writer", args.writer if args.writer in _OPTIONS else "module:Name", _OPTIONS)
    for name, most in (("support", 1.0), ("alike", 1.0), ("least_cosine", 1.0), ("temperature", 2.0)):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be from 0 to {most:g}")
    if args.least_cosine is not None and args.encoder is None:
        raise ValueError(f"--least-cosine {args.least_cosine}: needs --encoder, the directory of a sentence encoder")


def _given(args: argparse.Namespace, names: Iterable[str], **renamed: str) -> dict[str, Any]:
    """Return the options that were given; renamed: option -> name of its field."""
    return {renamed.get(name, name): value for name in names if (value := getattr(args, name)) is not None}


def _by_template(args: argparse.Namespace, dataset: "Dataset") -> None:
    from hllm_torchrec.creative.template import TemplateRule, write_by_template

    rule = TemplateRule(name=args.title, least=args.least, **_given(args, _TEMPLATE))
    rows, left_out = write_by_template(dataset, rule)
    if not len(rows):
        why = "; ".join(f"{count:,}: {reason}" for reason, count in left_out.items())
        raise ValueError(f"{dataset.root}: no like gets a text ({why}); lower --least, or choose another --feature")
    counts = _write(args, dataset, rows, None, {"writer": "template", "rule": vars(rule), "left_out": left_out})
    say(f"{counts.replace(' texts ', ' texts by rule ', 1)}; {sum(left_out.values()):,} likes without one")


def _by_model(args: argparse.Namespace, dataset: "Dataset") -> None:
    from hllm_torchrec.creative.writing.answers import answers_folder
    from hllm_torchrec.creative.writing.pipeline import Checks, Parameters, build_by_writer, prompts_hash
    from hllm_torchrec.creative.writing.requests import Selection, wanted_texts
    from hllm_torchrec.data.creative_table import answers_lock

    selection = Selection(title=args.title, least=args.least, **_selected(args))
    parameters = Parameters(**_given(args, _PARAMETERS, answer_tokens="max_tokens"))
    rules, (writer, judge) = _rules(args), _writers(args)
    checks = Checks(judge, _encoder(args), **_given(args, ("least_cosine",)))
    wanted = list(wanted_texts(dataset, selection))
    if not wanted:
        raise ValueError(f"{dataset.root}: no like has {args.least} earlier likes and a title; lower --least")
    for one in {writer, judge} - {None}:
        if host := getattr(one, "leaves_machine", ""):
            users = len({one.raw_user for one in wanted})
            what = f"titles of up to {selection.history} liked items of each of {users:,} users (no ids)"
            say(f"{what} and facts of items are sent to {host}", sys.stderr)
    folder = answers_folder(dataset.root, args.name)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "writer": writer.name,
        "judge": None if judge is None else judge.name,
        "selection": vars(selection),
        "parameters": vars(parameters),
        "filters": {**vars(rules), "allowed": len(rules.allowed), **_given(args, ("least_cosine",))},
        "prompts": prompts_hash(),
    }
    # The lock is held until the table is written, because `hllm forget` in between would miss the texts of the build.
    with answers_lock(folder):
        built = build_by_writer(wanted, writer, folder, parameters, rules, checks)
        _write_built(args, dataset, built, facts)


def _write_built(args: argparse.Namespace, dataset: "Dataset", built: "Built", facts: dict[str, Any]) -> None:
    """Write the texts of a language model; print their number, and how many were left out for each reason."""
    if built.errors:
        say(f"without an answer: {len(built.errors):,} prompts, the first because of: {built.errors[0]}", sys.stderr)
    reasons = [f"{count:,}: {reason}" for reason, count in built.left_out.items()]
    if not len(built.rows):
        why = "; ".join(reasons)
        raise ValueError(
            f"no text is left of {len(built.dropped):,} ({why}): change --model or filters; answers are kept"
        )
    counts = _write(args, dataset, built.rows, built.dropped, {**facts, "left_out": built.left_out})
    say("\n  ".join([f"{counts}; {len(built.dropped):,} left out", *reasons]))


def _selected(args: argparse.Namespace) -> dict[str, Any]:
    found = _given(args, (*_SELECTION, "seed"))
    return found | ({"facts": tuple(args.facts)} if args.facts else {})


def _rules(args: argparse.Namespace) -> Any:
    from hllm_torchrec.common.text_files import read_list
    from hllm_torchrec.creative.filters import TextRules

    found = _given(args, _RULES)
    return TextRules(**found | ({"allowed": tuple(read_list(args.allowed))} if args.allowed else {}))


def _encoder(args: argparse.Namespace) -> "TextCosine | None":
    if args.encoder is None:
        return None
    from hllm_torchrec.creative.writing.text_cosine import TextCosine  # imports torch

    return TextCosine(args.encoder)


def _writers(args: argparse.Namespace) -> "tuple[Writer, Writer | None]":
    """Open the writer and the judge (None: no judge), which share the limits of requests and tokens."""
    from hllm_torchrec.creative.writing.openai_writer import Budget, Endpoint, OpenAIWriter
    from hllm_torchrec.creative.writing.writer import custom_writer

    if args.writer not in ("openai", "local"):
        return custom_writer(args.writer), None
    if args.model is None:
        what = "the server's name of a model" if args.writer == "openai" else "the directory of a language model"
        raise ValueError(f"--model is missing: {what}")
    budget, server = Budget(**_given(args, _BUDGET)), {"base_url": "", **_given(args, _ENDPOINT)}

    def open_model(model: str) -> "Writer":
        if args.writer == "openai":
            return OpenAIWriter(Endpoint(model=model, **server), budget)
        from hllm_torchrec.creative.writing.local_writer import LocalWriter  # imports torch

        return LocalWriter(model)

    writer = open_model(args.model)
    if args.judge is None:
        return writer, None
    return writer, writer if args.judge == args.model else open_model(args.judge)


def _write(
    args: argparse.Namespace, dataset: "Dataset", rows: "pa.Table", dropped: "pa.Table | None", facts: dict[str, Any]
) -> str:
    """Write the table; returns a text with its path and counts."""
    import numpy as np
    import pyarrow as pa

    from hllm_torchrec.data.creative_table import split_by_user, write_table
    from hllm_torchrec.data.split import SPLITS

    of_row = np.array(list(split_by_user(rows["raw_user_id"].to_pylist(), args.fractions)))
    parts = {split: rows.filter(pa.array(of_row == split, pa.bool_())) for split in SPLITS}
    path = write_table(dataset, args.name, parts, dropped, {**facts, "fractions": list(args.fractions)})
    counts = ", ".join(f"{split} {len(part):,}" for split, part in parts.items())
    return f"{path}: {len(rows):,} texts ({counts})"
