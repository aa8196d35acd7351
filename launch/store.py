"""`hllm store`: inspects, verifies, compacts or exports an embedding store, or deletes vectors from it.

hllm store info stores/items
hllm store verify stores/items                             # every checksum; exit status 1 if one is wrong
hllm store compact stores/items                            # one segment; removes deleted vectors from the disk
hllm store export stores/items --parquet exports/items     # or --faiss exports/index
hllm store delete stores/users --id 4711 --id 4712         # or --ids FILE, one per line; compacts
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hllm_torchrec.common.terminal import printable, say
from hllm_torchrec.common.text_files import read_list
from hllm_torchrec.launch.entry import CommandParser, entry_point

if TYPE_CHECKING:  # `--help` needs no torch
    from hllm_torchrec.store.store import EmbeddingStore


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm store", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in (
        ("info", "print the contents of the store and the facts of the model that wrote it"),
        ("verify", "compare every file with its checksum"),
        ("compact", "rewrite all live vectors as one segment"),
        ("export", "write all live vectors for other programs"),
        ("delete", "delete vectors, and compact the store, so that they are also gone from the disk"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("store", type=Path, help="folder of the store")
        if name == "export":
            target = command.add_mutually_exclusive_group(required=True)
            target.add_argument("--parquet", type=Path, metavar="DIR", help="Parquet files of id and embedding")
            target.add_argument(
                "--faiss", type=Path, metavar="DIR", help="a FAISS index of cosine similarity, and its ids"
            )
        if name == "delete":
            command.add_argument("--id", action="append", default=[], help="an id (repeatable)")
            command.add_argument("--ids", type=Path, metavar="FILE", help="file of ids, one per line")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command and print its result.

    Returns:
        1 if `verify` finds damage or `delete` is given an id without a vector, else 0.

    Raises:
        ValueError: the store does not exist or is damaged, or the arguments do not fit.
    """
    from hllm_torchrec.store.export_formats import export_faiss, export_parquet
    from hllm_torchrec.store.store import EmbeddingStore

    store = EmbeddingStore.open(args.store)
    if args.command == "info":
        say(describe(store))
    elif args.command == "verify":
        damage = store.verify()
        say("\n".join(damage) or f"{args.store}: every file is intact")
        return int(bool(damage))
    elif args.command == "compact":
        store.compact()
        say(describe(store))
    elif args.command == "export":
        snapshot = store.snapshot()
        write, target = (export_parquet, args.parquet) if args.parquet else (export_faiss, args.faiss)
        say(f"{write(snapshot, target):,} vectors: {target}")
    else:
        ids = list(dict.fromkeys([*args.id, *(read_list(args.ids) if args.ids else [])]))
        if not ids:
            raise ValueError("delete: no ids: give --id or --ids FILE")
        missing = delete(store, ids)
        say(f"{len(ids) - len(missing):,} of {len(ids):,} ids had a vector; all are deleted")
        if missing:
            say(f"{len(missing):,} had none: {', '.join(map(repr, missing[:20]))}{', ...' * (len(missing) > 20)}")
        return int(bool(missing))
    return 0


def describe(store: "EmbeddingStore") -> str:
    """Description of a store's contents, one fact per line."""
    snapshot = store.snapshot()
    size = sum(n for run in snapshot.segments for n, _ in run.facts.files.values())
    lines = {
        "vectors": f"{len(snapshot):,} of {store.width} x {store.dtype}, keys {store.kind}",
        "on disk": f"{size / 1e6:,.1f} MB in {len(snapshot.segments)} segments, version {snapshot.version}",
        "made by": f"{store.fingerprint[:16]}",
    } | {f"  {name}": printable(str(value)) for name, value in store.facts.items()}
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())


def delete(store: "EmbeddingStore", ids: list[str]) -> list[str]:
    """Delete ids and compact; returns those that had no vector."""
    keys = [_number(store, i) for i in ids] if store.kind == "int64" else ids
    _, has_vector = store.snapshot().content_hashes(keys)
    missing = [name for name, has in zip(ids, has_vector, strict=True) if not has]
    with store.writer() as writer:
        writer.delete(keys)
        writer.commit()
    store.compact()
    return missing


def _number(store: "EmbeddingStore", text: str) -> int:
    """Parse an id of a store whose ids are numbers."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"delete: id {text!r}: the ids of {store.root} are whole numbers") from None


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
