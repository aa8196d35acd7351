"""Table of the text models of transformers: how the Item LLM reads each of them, and which can be a User LLM.

    python scripts/experiments/text_models.py --write docs/support.md      # replaces the table between two comments
    python scripts/experiments/text_models.py --only llama bert            # prints the rows of these types
    python scripts/experiments/text_models.py --rows rows.jsonl            # continues after an interruption

For every model type of AutoModel, the script builds a small model from the default config (with the fields of `FIELDS`)
and does the checks that precede training. Types with several parts (images, sound, two stacks) are left out.
"""

import argparse
import json
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import MODEL_MAPPING, AutoConfig

from hllm_torchrec.models.backbone_check import check_user_backbone, text_reading
from hllm_torchrec.models.model_files import check_config

FIELDS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 4,
    "sep_token_id": 5,
}
"""Values of fields, set in the configs that have the field."""
SECONDS = 120
BEGIN, END = "<!-- text models: scripts/experiments/text_models.py -->", "<!-- end of text models -->"


class Row(NamedTuple):
    """Row of the table; user: None if it can be a User LLM, else the reason."""

    kind: str
    arrangement: str
    causal: bool
    user: str | None


def small(kind: str) -> Any:
    """Small config of a model type. Raises ValueError if the type has several parts or does not read text."""
    default = AutoConfig.for_model(kind)
    if getattr(default, "is_encoder_decoder", False):
        raise ValueError("has two stacks")
    check_config(default)
    names, facts = type(default).attribute_map, default.to_dict()
    if not facts.get(names.get("vocab_size", "vocab_size")):
        raise ValueError("has no vocabulary")
    chosen = {names.get(name, name): value for name, value in FIELDS.items() if names.get(name, name) in facts}
    layers = facts.get(names.get("num_hidden_layers", "num_hidden_layers"))
    for name, value in facts.items():  # a list with an entry for each layer: use the first two different entries
        if isinstance(value, list) and layers and len(value) == layers:
            kinds = list(dict.fromkeys(map(str, value)))[:2]
            first = [value[[str(each) for each in value].index(text)] for text in kinds]
            chosen[name] = (first * 2)[:2]
    if facts.get("num_key_value_heads") == facts.get("num_attention_heads"):
        chosen["num_key_value_heads"] = 4
    try:
        return AutoConfig.for_model(kind, **chosen)
    except Exception:  # FIELDS do not fit this type: use its default sizes, which the check reduces
        return default


def rows(kinds: list[str]) -> Iterator[Row | tuple[str, str]]:
    """Yield the row of each type, or (type, reason why it cannot be read)."""
    for kind in kinds:
        signal.alarm(SECONDS)
        try:
            config = small(kind)
            reading = text_reading(config)
            yield Row(kind, reading.arrangement, reading.causal, _user_problem(config))
        except TimeoutError:
            yield kind, f"no answer in {SECONDS} s"
        except Exception as error:  # the default config of this type is not that of a text model
            yield kind, str(error).splitlines()[0] if str(error) else type(error).__name__
        finally:
            signal.alarm(0)


def _user_problem(config: Any) -> str | None:
    try:
        check_user_backbone(config)
    except ValueError as error:
        return str(error)
    return None


def table(found: list[Row | tuple[str, str]]) -> str:
    """The tables of Item LLMs and of User LLMs in Markdown."""
    read = [row for row in found if isinstance(row, Row)]
    lines = [
        f"transformers {transformers.__version__}; {len(read)} model types.",
        "",
        "| Item LLM | direction | model types |",
        "|---|---|---|",
    ]
    for arrangement in ("packed", "padded", "equal_lengths"):
        for causal in (True, False):
            kinds = sorted(row.kind for row in read if (row.arrangement, row.causal) == (arrangement, causal))
            if kinds:
                direction = "left to right" if causal else "both"
                names = ", ".join(f"`{kind}`" for kind in kinds)
                lines.append(f"| {arrangement.replace('_', ' ')} | {direction} | {names} |")
    lines += ["", "| User LLM | model types |", "|---|---|"]
    for title, wanted in (("can be used", True), ("refused", False)):
        kinds = sorted(row.kind for row in read if (row.user is None) == wanted)
        lines.append(f"| {title} | {', '.join(f'`{kind}`' for kind in kinds)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="only these model types")
    rows_help = "file of JSON lines with the rows; types that are in it are not checked again"
    parser.add_argument("--rows", type=Path, metavar="FILE", help=rows_help)
    parser.add_argument("--write", type=Path, metavar="FILE", help="page whose table is replaced")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()

    def too_late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_late)
    known = sorted({config.model_type for config in MODEL_MAPPING if config.model_type})
    lines = args.rows.read_text().splitlines() if args.rows and args.rows.exists() else []
    kept = {row[0]: Row(*row) if len(row) == len(Row._fields) else tuple(row) for row in map(json.loads, lines)}
    for row in rows([kind for kind in args.only or known if kind not in kept]):
        kept[row[0]] = row
        print(*row, sep="\t", file=sys.stderr, flush=True)
        if args.rows:
            with args.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
    text = table([kept[kind] for kind in args.only or known])
    if args.write is None:
        print(text)
        return 0
    page = args.write.read_text(encoding="utf-8")
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    args.write.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
