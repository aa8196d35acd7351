"""`hllm import-hllm`: converts the published HLLM weights to models of this library.

    hllm import-hllm --checkpoint pytorch_model.bin --item-llm TinyLlama --user-llm TinyLlama --output models/hllm-1b
    hllm import-hllm ... --output runs/hllm-1b --dataset data/pixel200k      # also as an evaluated run

The output contains item_llm/ and user_llm/ (Hugging Face directories) and a config.yaml for further training. With a
prepared dataset it is also a run with a checkpoint at step 0, for `hllm evaluate`, `embed` and `recommend`.
"""

import argparse
import sys
from pathlib import Path

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm import-hllm", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="pytorch_model.bin")
    base_help = "Hugging Face directory of the {} LLM from which training started; only {} read"
    parser.add_argument(
        "--item-llm",
        type=Path,
        required=True,
        metavar="DIR",
        help=base_help.format("Item", "its config and tokenizer are"),
    )
    parser.add_argument(
        "--user-llm", type=Path, required=True, metavar="DIR", help=base_help.format("User", "its config is")
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder to write")
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="prepared dataset: the output is then also a run")
    parser.add_argument("--prompt", help="prefix of every text (default: the published one)")
    parser.add_argument(
        "--text-keys", nargs="+", metavar="COLUMN", help="text columns (default: title tag description)"
    )
    parser.add_argument("--max-text-length", type=int, metavar="N", help="maximum tokens per text (default: 256)")
    parser.add_argument("--max-history", type=int, metavar="N", help="maximum events per history (default: 50)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Convert the weights, and create a run if a dataset is given.

    Raises:
        ValueError: see `import_public` and `build_trainer`.
    """
    from hllm_torchrec.data.dataset import Dataset
    from hllm_torchrec.weights.import_hllm import TextOptions, import_public

    given = {name: getattr(args, name) for name in ("prompt", "max_text_length", "max_history")}
    given["text_keys"] = tuple(args.text_keys) if args.text_keys else None
    text = TextOptions(**{name: value for name, value in given.items() if value is not None})
    if args.dataset is not None:
        Dataset.open(args.dataset).text(text.text_keys)  # report errors before writing gigabytes
    import_public(args.checkpoint, args.item_llm, args.user_llm, args.output, text, str(args.dataset or "data/hllm"))
    say(f"{args.output}: item_llm, user_llm and config.yaml are written")
    if args.dataset is not None:
        _make_run(args.output)


def _make_run(output: Path) -> None:
    from hllm_torchrec.config.loading import config_from_file
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.training.trainer_setup import build_trainer

    with distributed_device() as device:
        found = build_trainer(config_from_file(output / "config.yaml"), device).save_untrained()
    shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if "@" in name)
    say(f"{output}: is a run now; on its validation part {shown}")


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
