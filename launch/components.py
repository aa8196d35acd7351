"""TorchX components, one per job: `torchx run launch/components.py:embed --j 1x2 --run_dir runs/quickstart ...`.

    prepare       convert a source to a dataset directory, in one process
    train         train a configuration, on one or more ranks
    evaluate      evaluate a checkpoint or prediction files
    embed         write new and changed item and user embeddings into stores
    cluster       group the users of a store into clusters, in one process
    create        write the titles of items for clusters of users
    nightly       append a day, train on it, evaluate, embed and publish
    serve         answer requests for scores, in one process per replica
    three_stages  train, embed, train from the store, embed: the paper's stages I and II, and vectors for III
    job           any other job of hllm that runs as ranks

Each component has its own options and those of `_machine`; components of one process lack j, restarts and rdzv_port.
Every job can be restarted: `train` continues from its last checkpoint, `embed` and `create` compute what their outputs
lack.

TorchX executes this file inside the module `torchx.specs.finder`, so the file imports nothing from this project, and no
name defined here may be a name of that module.
"""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Dict, List, Optional  # noqa: UP035 - TorchX reads the annotations, and knows these

from torchx import specs
from torchx.components import dist as torchx_dist


def _machine(
    *,
    j: str = "1x1",
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,  # noqa: N803 - as in TorchX's own components
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    max_retries: int = 0,
    restarts: int = 0,
    rdzv_port: int = 29500,
) -> None:
    """Options of every component.

    Args:
        j: nodes x processes, such as 4x8
        image: container image, for schedulers that need one
        h: named resource, instead of cpu, gpu and memMB
        cpu: processors per node
        gpu: accelerators per node
        memMB: memory per node in MB
        env: environment variables, NAME=VALUE separated by commas
        mounts: type=bind,src=/data,dst=/data[,readonly], for schedulers that support them
        max_retries: restarts of the complete job by the scheduler
        restarts: how often torchrun restarts a node's ranks after one of them has failed
        rdzv_port: rendezvous port on the first node, for several nodes (three_stages: the first of four)
    """


def _component(function: Callable[..., specs.AppDef], without: tuple[str, ...] = ()) -> Callable[..., specs.AppDef]:
    """Add the options of `_machine` to signature and docstring of `function(*arguments, own options, **machine)`.

    TorchX builds the command line of a component from these two, while its linter reads the `def` statement.
    """
    # The last parameter, **machine, is replaced by the explicit options of `_machine`.
    shared = [p for name, p in inspect.signature(_machine).parameters.items() if name not in without]
    own = inspect.signature(function)
    signature = own.replace(parameters=[*list(own.parameters.values())[:-1], *shared])
    lines = str(inspect.getdoc(_machine)).partition("Args:\n")[2].splitlines()
    described = [line for line in lines if line.split(":")[0].strip() not in without]

    @wraps(function)
    def component(*arguments: str, **options: Any) -> specs.AppDef:
        given = signature.bind(*arguments, **options)
        given.apply_defaults()
        return function(*given.args, **given.kwargs)

    component.__signature__ = signature  # type: ignore[attr-defined]
    component.__doc__ = "\n".join([str(inspect.getdoc(function)), *described])
    return component


@partial(_component, without=("j", "restarts", "rdzv_port"))
def prepare(
    *arguments: str, source: str, output: str, path: str = "", split: str = "time", **machine: Any
) -> specs.AppDef:
    """Convert a source to a dataset directory: `hllm prepare`, in one process.

    Args:
        arguments: further arguments of `hllm prepare`, after `--`
        source: ml-100k, ml-1m, pixelrec, kuairec, amazon or table
        output: dataset directory to write
        path: the source's file or folder
        split: time, date, leave_one_out or leave_last
    """
    given = ["--source", source, "--output", output, "--split", split, *_option("--path", path), *arguments]
    return _one_process("prepare", given, **machine)


@partial(_component, without=("j", "restarts", "rdzv_port"))
def serve(
    *arguments: str,
    run_dir: str,
    token_file: str,
    state: str,
    port: int = 8400,
    replicas: int = 1,
    **machine: Any,
) -> specs.AppDef:
    """The service: `hllm serve`, one process per replica, each with a separate file of events.

    Requests must be routed by user, so that each user's requests and events reach one replica.

    Args:
        arguments: further arguments of `hllm serve`, after `--`, such as --watch 60
        run_dir: run directory of `hllm train`, or the alias of a night's release
        token_file: file with the bearer token that requests need
        state: folder of the events, on a disk that outlasts the replicas
        port: port of every replica
        replicas: number of processes
    """
    own_state = f"{state}/events-{specs.macros.replica_id}.sqlite"
    given = ["--run", run_dir, "--host", "0.0.0.0", "--port", str(port), "--token-file", token_file]
    given += ["--state", own_state, *arguments]
    return _one_process("serve", given, num_replicas=replicas, port_map={"http": port}, **machine)


@_component
def train(*arguments: str, config: str, output: str = "", resume: bool = True, **machine: Any) -> specs.AppDef:
    """Training: `hllm train`, on one or more ranks.

    Args:
        arguments: overrides of the configuration, after `--`, such as --optim.lr 0.001
        config: configuration file, such as configs/quickstart.yaml
        output: run directory, instead of the configuration's
        resume: continue from the last checkpoint of the run directory, if there is one
    """
    given = ["--config", config, *_option("--output", output), "--resume", str(resume).lower(), *arguments]
    return _on_ranks("train", given, **machine)


@_component
def job(*arguments: str, name: str, **machine: Any) -> specs.AppDef:
    """Any other job of `hllm` that runs as ranks, such as exposures, downstream or baselines.

    Args:
        arguments: the job's own arguments, after `--`
        name: the job, a module of hllm_torchrec.launch
    """
    return _on_ranks(name, list(arguments), **machine)


@_component
def evaluate(
    *arguments: str,
    run_dir: str = "",
    predictions: Optional[List[str]] = None,  # noqa: UP006, UP045
    baseline: str = "",
    max_drop: float = 0.001,
    **machine: Any,
) -> specs.AppDef:
    """Offline evaluation: `hllm evaluate` on a checkpoint or on prediction files, on one or more ranks.

    Args:
        arguments: further arguments of `hllm evaluate`, after `--`
        run_dir: run directory of `hllm train`
        predictions: NAME=PATH of prediction files, separated by commas
        baseline: a metrics.json to compare with; the job fails if the AUC dropped by more than max_drop
        max_drop: largest allowed drop of AUC from the baseline
    """
    given = _option("--run-dir", run_dir)
    if predictions:
        given += ["--predictions", *predictions]
    if baseline:
        given += ["--baseline", baseline, "--max-drop", str(max_drop)]
    return _on_ranks("evaluate", [*given, *arguments], **machine)


@_component
def embed(
    *arguments: str,
    run_dir: str,
    items: str = "",
    users: str = "",
    since: str = "",
    checkpoint: str = "best",
    **machine: Any,
) -> specs.AppDef:
    """Write new and changed embeddings into stores: `hllm embed`, divided among the ranks.

    Args:
        arguments: further arguments of `hllm embed`, after `--`
        run_dir: run directory of `hllm train`
        items: store of items, created if missing
        users: store of users, created if missing
        since: YYYY-MM-DD; users without an event since then are not updated
        checkpoint: best, latest, or a directory
    """
    given = _embed_arguments(run_dir, items, users, since, checkpoint)
    return _on_ranks("embed", [*given, *arguments], **machine)


@partial(_component, without=("j", "restarts", "rdzv_port"))
def cluster(*arguments: str, users: str, output: str, clusters: int = 0, **machine: Any) -> specs.AppDef:
    """Clusters of the users of a store: `hllm cluster`, in one process.

    Args:
        arguments: further arguments of `hllm cluster`, after `--`, such as --refit
        users: store of users
        output: folder of the clusters
        clusters: number of clusters; 0: assign users to the existing clusters
    """
    given = ["--users", users, "--output", output, *_option("--clusters", str(clusters or ""))]
    return _one_process("cluster", [*given, *arguments], **machine)


@_component
def create(
    *arguments: str, run_dir: str, clusters: str, output: str, top: int = 0, checkpoint: str = "best", **machine: Any
) -> specs.AppDef:
    """Titles of items for clusters of users: `hllm create`, divided among the ranks.

    Args:
        arguments: further arguments of `hllm create`, after `--`, such as --temperature 0.8
        run_dir: run directory of `hllm train`
        clusters: folder of `hllm cluster`
        output: folder of the titles
        top: number of best clusters for which an item gets a title; 0: all
        checkpoint: best, latest, or a directory
    """
    given = ["--run-dir", run_dir, "--clusters", clusters, "--output", output, "--top", str(top)]
    return _on_ranks("create", [*given, "--checkpoint", checkpoint, *arguments], **machine)


@_component
def nightly(*arguments: str, config: str, night: str = "", **machine: Any) -> specs.AppDef:
    """The night as one job: `hllm nightly`, on one or more ranks; a restarted job continues where it stopped.

    Args:
        arguments: further arguments of `hllm nightly`, after `--`, such as --steps train evaluate
        config: a YAML of the night
        night: name of the night (default: the oldest unfinished one, else today's date)
    """
    return _on_ranks("nightly", ["--config", config, *_option("--night", night), *arguments], **machine)


@_component
def three_stages(
    *arguments: str,
    one: str = "configs/stages/1.yaml",
    two: str = "configs/stages/2.yaml",
    folder: str = "runs/three_stages",
    **machine: Any,
) -> specs.AppDef:
    """The paper's stages I and II: train, embed items, train from the store, embed items and users for stage III.

    Four commands in sequence on the same nodes; a restarted job continues where it stopped. In `folder` it
    writes the run directories one and two and the stores items and users; stage II starts from the weights of stage I.

    Args:
        arguments: overrides of both configurations, after `--`, such as --data.dataset data/ml-100k
        one: configuration of stage I
        two: configuration of stage II
        folder: folder for runs and stores
    """
    first, second, items = f"{folder}/one", f"{folder}/two", f"{folder}/items"
    train_two = ["--output", second, "--start_from", first, "--item_llm.store", items]
    steps = [
        ("train", ["--config", one, "--output", first, "--resume", "true", *arguments]),
        ("embed", _embed_arguments(first, items)),
        ("train", ["--config", two, *train_two, "--resume", "true", *arguments]),
        ("embed", _embed_arguments(second, items, f"{folder}/users")),
    ]
    # One port per step: a slow node, still in the previous step, must not join the rendezvous of the next.
    first_port = machine.pop("rdzv_port")
    ports = [first_port + number for number in range(len(steps))]
    apps = [_on_ranks(job, given, **machine, rdzv_port=port) for (job, given), port in zip(steps, ports)]
    role = apps[0].roles[0]
    role.name, role.args = "three_stages", ["-c", " && ".join(app.roles[0].args[1] for app in apps)]
    role.port_map = {f"c10d{number}": port for number, port in enumerate(ports)}
    return specs.AppDef(name="three_stages", roles=[role])


def _one_process(job: str, given: List[str], **machine: Any) -> specs.AppDef:  # noqa: UP006
    """Run `hllm_torchrec.launch.<job>` as one process, or one for each of `num_replicas`, without torchrun."""
    mounts, env = machine.pop("mounts"), machine.pop("env")
    resource = specs.resource(**{name: machine.pop(name) for name in ("cpu", "gpu", "memMB", "h")})
    role = specs.Role(
        name=job,
        entrypoint="python",
        args=["-m", f"hllm_torchrec.launch.{job}", *given],
        env=dict(env or {}),
        resource=resource,
        mounts=specs.parse_mounts(mounts) if mounts else [],
        **machine,
    )
    return specs.AppDef(name=job, roles=[role])


def _on_ranks(job: str, given: List[str], *, restarts: int, **machine: Any) -> specs.AppDef:  # noqa: UP006
    """Run `hllm_torchrec.launch.<job>` under torchrun, with TorchX's component."""
    start = getattr(torchx_dist, "torchrun", None) or torchx_dist.ddp  # named ddp in TorchX 0.7.0
    machine["env"] = {**(machine["env"] or {}), **({"PET_MAX_RESTARTS": str(restarts)} if restarts else {})}
    found: specs.AppDef = start(*given, m=f"hllm_torchrec.launch.{job}", name=f"/{job}", **machine)
    return found


def _embed_arguments(run_dir: str, items: str, users: str = "", since: str = "", checkpoint: str = "best") -> List[str]:  # noqa: UP006
    """Arguments of `hllm embed`; --run-dir, because torchrun takes --run for its own option."""
    stores = [*_option("--items", items), *_option("--users", users), *_option("--since", since)]
    return ["--run-dir", run_dir, *stores, "--checkpoint", checkpoint]


def _option(name: str, value: str) -> List[str]:  # noqa: UP006
    """Command-line option with its value; empty if the value is empty."""
    return [name, value] if value else []
