"""`hllm init`: writes a configuration for a dataset, completed from the recipe of a task.

hllm init --data data/shop                      # ranking.yaml
hllm train --config ranking.yaml
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from hllm_torchrec import configs
from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.common.terminal import say
from hllm_torchrec.config.inheritance import merge, read_resolved
from hllm_torchrec.config.recipes import RECIPES, recipe_choices
from hllm_torchrec.launch.entry import CommandParser, entry_point
from hllm_torchrec.launch.recipes import facts_of, fetch_encoder, with_choices


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm init", description=__doc__)
    parser.add_argument(
        "--dataset",
        "--data",
        dest="data",
        required=True,
        metavar="DIR",
        help="dataset directory written by hllm prepare",
    )
    parser.add_argument(
        "--task",
        choices=list(RECIPES),
        default="ranking",
        help="task of the model: ranking (score candidates) or retrieval (next item); default: ranking",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: TASK.yaml here)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the configuration.

    Raises:
        ValueError: the dataset cannot be read or does not fit the task, the file exists, or the encoder cannot be
            downloaded.
    """
    target = args.output or Path(f"{args.task}.yaml")
    if target.exists():
        raise ValueError(f"--output {target}: exists; name another file, or delete it first")
    content = read_resolved(Path(configs.__file__).parent / "recipes" / f"{args.task}.yaml")
    choices = recipe_choices(args.task, facts_of(args.data), content)
    del content["recipe"]
    content = with_choices(merge(content, {"data": {"dataset": str(args.data)}}), choices)
    target.parent.mkdir(parents=True, exist_ok=True)
    said = [str(choice) for choice in choices] + _left_out(args)
    replace_file(target, _text(args, said, content))
    for line in said:
        say(line)
    fetch_encoder(content)
    say(f"{target}: written; train with `hllm train --config {target}`")


def _text(args: argparse.Namespace, said: list[str], content: dict[str, Any]) -> str:
    head = f"# The recipe {args.task} for {args.data}, as `hllm init` wrote it.\n"
    return (
        head
        + "".join(f"#   {line}\n" for line in said)
        + str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))
    )


def _left_out(args: argparse.Namespace) -> list[str]:
    """At most one line that lists labels and context of the dataset that the recipe does not use."""
    from hllm_torchrec.data.dataset import Dataset

    schema = Dataset.open(args.data).schema
    labels, context = list(schema.label_names[1:]), [one.name for one in schema.context]
    found = [f"the {kind} {', '.join(names)}" for kind, names in (("labels", labels), ("context", context)) if names]
    if args.task != "ranking" or not found:
        return []
    line = f"not used: {' and '.join(found)}; add them by objective.tasks and data.context, see docs/tasks.md"
    return [line]


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
