"""`hllm serve`: answers requests for scores and recommendations over HTTP, with the model of a run.

hllm serve --run runs/quickstart
curl -X POST localhost:8400/v1/score -H 'content-type: application/json' -d '{"user": "196", "candidates": ["242"]}'
"""

import argparse
import signal
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from hllm_torchrec.common.terminal import say
from hllm_torchrec.common.token_file import read_token
from hllm_torchrec.launch.entry import CommandParser, entry_point, natural, positive, positive_number
from hllm_torchrec.lifecycle.releases import nights_folder

if TYPE_CHECKING:
    from hllm_torchrec.serving.service import Service

MIB = 1 << 20


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm serve", description=__doc__)
    parser.add_run()
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument(
        "--port", type=natural, default=8400, help="port (default: 8400); 0: a free one, which is printed"
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the bearer token that requests need; required for a --host that other machines can reach, for "
        "deletions and for reloads",
    )
    parser.add_argument("--quiet", action="store_true", help="print no line for each request")
    _add_model(parser)
    _add_limits(parser)
    _add_reload(parser)
    return parser


def _add_model(parser: CommandParser) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--cache",
        type=positive,
        default=1024,
        metavar="MIB",
        help="MiB of memory for cached user states (default: 1024)",
    )
    group.add_argument(
        "--items", type=Path, metavar="STORE", help="store of hllm embed --items: read it instead of encoding the texts"
    )
    group.add_argument(
        "--creatives", type=Path, metavar="DIR", help="titles of hllm create: /v1/recommend returns each user's title"
    )
    group.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="SQLite file of events (default: serving/events.sqlite of the run, or of the folder of the nights)",
    )
    group.add_argument(
        "--index",
        choices=("flat", "ivf", "none"),
        default="flat",
        help="item index for /v1/recommend: flat (exact, the default), ivf (approximate), or none (the head ranks all)",
    )


def _add_limits(parser: CommandParser) -> None:
    group = parser.add_argument_group("limits of requests")
    group.add_argument(
        "--batch", type=positive, default=16, metavar="N", help="maximum number of requests in a batch (default: 16)"
    )
    group.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="MS",
        help="milliseconds that a batch waits for more requests (default: 0)",
    )
    group.add_argument(
        "--queue",
        type=positive,
        default=256,
        metavar="N",
        help="maximum number of unanswered requests; further ones get 429 (default: 256)",
    )
    group.add_argument(
        "--deadline",
        type=positive_number,
        default=1000.0,
        metavar="MS",
        help="milliseconds within which a request must be answered, else 503 (default: 1000)",
    )


def _add_reload(parser: CommandParser) -> None:
    group = parser.add_argument_group("reload")
    group.add_argument(
        "--watch",
        type=positive_number,
        metavar="S",
        help="check every S seconds whether the checkpoint, its calibration, the dataset or the titles have changed, "
        "and reload what has",
    )
    group.add_argument(
        "--max-change",
        type=positive_number,
        default=0.5,
        metavar="P",
        help="refuse a reload that changes a probability of a recent request by more than P (default: 0.5)",
    )


def run(args: argparse.Namespace) -> None:
    """Load the model, then answer requests until SIGTERM or Ctrl-C; requests that were accepted before are answered.

    Raises:
        ValueError: the run or checkpoint does not exist, the model cannot score, the token is missing, or a package is
            not installed.
    """
    token = read_token(args.token_file, args.host)
    uvicorn = import_uvicorn()
    from hllm_torchrec.data.event_log import EventLog
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.serving.app import create_app
    from hllm_torchrec.serving.batch_scorer import BatchScorer
    from hllm_torchrec.serving.engine import Engine
    from hllm_torchrec.serving.micro_batches import BatchLimits
    from hllm_torchrec.serving.reload import Reloader, published, watch
    from hllm_torchrec.serving.served_titles import ServedTitles
    from hllm_torchrec.serving.service import Service

    titles = None if args.creatives is None else ServedTitles(args.creatives)  # before a model is loaded
    limits = BatchLimits(args.batch, args.wait / 1e3, args.queue, args.deadline / 1e3)
    state = args.state or default_state(args.run)
    with distributed_device() as device, closing(EventLog(state)) as log:

        def load() -> Engine:
            scorer = BatchScorer.of_run(args.run, args.checkpoint, device, dataset=args.dataset, store=args.items)
            return Engine(scorer, log, args.cache * MIB, args.index, state.parent)

        service = Service(load(), limits, token, titles=titles)
        reloader, stop = Reloader(service, load, args.max_change), Event()
        if args.watch is not None:
            look = partial(published, args.run, args.checkpoint, args.dataset)
            Thread(target=watch, args=(reloader, look, args.watch, stop, say), daemon=True).start()
            if titles is not None:
                Thread(target=titles.watch, args=(args.watch, stop, say), daemon=True).start()
        listen(uvicorn, create_app(service, None if args.quiet else say, reloader), service, args.host, args.port)
        stop.set()


def default_state(run: Path) -> Path:
    """Default file of a service's events: in the run's folder.

    For a run of `hllm nightly` it is in the folder of the nights, because each night has a new run and old runs are
    removed. If an earlier version has written the file into the run, it is moved.

    Raises:
        ValueError: the run is at a URL or does not exist, or another service uses the file that must be moved.
    """
    if "://" in str(run) or ":/" in str(run):
        raise ValueError(f"--run {run}: at a URL: give --state, a file of this machine")
    if not run.exists():  # opening the event log would create the folder of a run that does not exist
        raise ValueError(f"{run}: no such file or directory")
    folder, name = nights_folder(run) or run, Path("serving", "events.sqlite")
    if folder != run and (run / name).exists() and not (folder / name).exists():
        from hllm_torchrec.data.event_log import EventLog

        EventLog(run / name).close()  # merges SQLite's write-ahead file into the file
        (folder / name).parent.mkdir(exist_ok=True)
        (run / name).replace(folder / name)
    return folder / name


def listen(uvicorn, app, service: "Service", host: str, port: int) -> None:  # type: ignore[no-untyped-def]
    """Answer requests until a signal; print the address as soon as requests are accepted."""
    config = uvicorn.Config(app, host=host, port=port, access_log=False, log_level="warning", server_header=False)
    server = uvicorn.Server(config)
    end, start = server.handle_exit, server.startup

    def handle_exit(number: int, frame: object) -> None:
        service.draining = True  # /readyz now answers 503, while accepted requests are still answered
        end(number, frame)

    async def startup(sockets: object = None) -> None:
        await start(sockets)
        if server.started:
            address = server.servers[0].sockets[0].getsockname()
            say(f"hllm serve: http://{host}:{address[1]}, model {service.engine.mark}")

    server.handle_exit, server.startup = handle_exit, startup
    # uvicorn raises the signal again after its shutdown; with this handler SIGTERM does not cause an error status.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server.run()


def import_uvicorn():  # type: ignore[no-untyped-def]
    """Import uvicorn and FastAPI.

    Raises:
        ValueError: a package is not installed.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ValueError(f'{error.name} is not installed: pip install "hllm_torchrec[serve]"') from None
    return uvicorn


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
