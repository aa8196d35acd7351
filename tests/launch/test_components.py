"""The TorchX components: what each scheduler would be given, and that `embed`'s command runs on two ranks."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchx import specs
from torchx.runner import Runner, get_runner

from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch.cluster import build_parser as cluster_parser
from hllm_torchrec.launch.serve import build_parser as serve_parser
from hllm_torchrec.store import EmbeddingStore
from tests.helpers import fixtures
from tests.helpers.processes import run_job
from tests.helpers.training_fixtures import config, train

ON_NODES = ["--j", "2x4", "--gpu", "4", "--cpu", "16", "--memMB", "65536", "--max_retries", "3", "--restarts", "2"]
ON_NODES += ["--env", "NCCL_DEBUG=INFO,X=1", "--image", "hllm:1", "--rdzv_port", "29600"]
MOUNTS = ["--mounts", "type=bind,src=/data,dst=/data,readonly,type=bind,src=/runs,dst=/runs"]
JOBS = {
    "train": (["--config", "c.yaml", "--output", "/runs/one"], "--config c.yaml --output /runs/one --resume true"),
    "evaluate": (["--run_dir", "/runs/one"], "--run-dir /runs/one"),
    "nightly": (["--config", "n.yaml", "--night", "2023-11-22"], "--config n.yaml --night 2023-11-22"),
    "embed": (
        ["--run_dir", "/runs/one", "--items", "/runs/i", "--users", "/runs/u", "--since", "1998-04-01"],
        "--run-dir /runs/one --items /runs/i --users /runs/u --since 1998-04-01 --checkpoint best",
    ),
    "create": (
        ["--run_dir", "/runs/one", "--clusters", "/runs/c", "--output", "/runs/t", "--top", "8"],
        "--run-dir /runs/one --clusters /runs/c --output /runs/t --top 8 --checkpoint best",
    ),
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "slurm": {"partition": "gpu"},
    "kubernetes": {"queue": "default", "validate_spec": False},  # the nightly would ask a cluster
    "local_docker": {},
}
VOLCANO = pytest.mark.filterwarnings(r"ignore:\s*Role \w+ configured with restarts:UserWarning")
"""TorchX warns that Volcano does not retry as it should; docs/clusters.md says what to do."""


@pytest.fixture(scope="module")
def runner() -> Any:
    with get_runner("test") as made:
        yield made


@pytest.fixture
def dryrun(runner: Runner, root: Path) -> Any:
    """Runs a component on a scheduler without starting anything; what the scheduler would be given."""

    def run(job: str, arguments: list[str], scheduler: str) -> Any:
        component = f"{root / 'launch' / 'components.py'}:{job}"
        return runner.dryrun_component(component, arguments, scheduler, SCHEDULERS.get(scheduler, {})).request

    return run


def torchrun(command: str) -> tuple[dict[str, str], list[str]]:
    """torchrun's options in a shell command, and what follows them (-m module arguments)."""
    words = shlex.split(command)
    at = words.index("-m")
    options = words[words.index("torchrun") + 1 : at]
    return dict(zip(options[::2], options[1::2], strict=True)), words[at + 1 :]


def check_command(command: str, job: str, arguments: str) -> None:
    """The ranks of 2 x 4, their meeting point, module and arguments."""
    options, rest = torchrun(command)
    assert (options["--nnodes"], options["--nproc_per_node"]) == ("2", "4")
    assert options["--rdzv_endpoint"].endswith(":29600")
    assert rest == [f"hllm_torchrec.launch.{job}", *arguments.split(), "--seed", "1"]


@pytest.mark.parametrize("job", list(JOBS))
def test_slurm_gets_ranks_resources_environment_and_retries(job: str, dryrun: Any) -> None:
    given, arguments = JOBS[job]
    request = dryrun(job, [*given, *ON_NODES, "--", "--seed", "1"], "slurm")
    assert request.max_retries == 3 and len(request.replicas) == 2
    for replica in request.replicas.values():
        wanted = {
            "partition": "gpu",
            "cpus-per-task": "16",
            "gpus-per-task": "4",
            "mem": "65536",
            "ntasks-per-node": "1",
        }
        assert {name: replica.sbatch_opts.get(name) for name in wanted} == wanted
        assert {"NCCL_DEBUG": "INFO", "X": "1", "PET_MAX_RESTARTS": "2"}.items() <= replica.env.items()
        assert replica.entrypoint == "bash"
        check_command(replica.args[1], job, arguments)
    script = request.materialize()
    assert re.search(r"#SBATCH .*--requeue", script) and "TORCHX_MAX_RETRIES=3" in script


@pytest.mark.parametrize("job", list(JOBS))
def test_docker_gets_ranks_resources_mounts_environment_and_retries(job: str, dryrun: Any) -> None:
    given, arguments = JOBS[job]
    request = dryrun(job, [*given, *ON_NODES, *MOUNTS, "--", "--seed", "1"], "local_docker")
    assert len(request.containers) == 2
    for container in request.containers:
        options = container.kwargs
        assert container.image == "hllm:1" and container.command[:2] == ["bash", "-c"]
        assert {"NCCL_DEBUG": "INFO", "X": "1", "PET_MAX_RESTARTS": "2"}.items() <= options["environment"].items()
        mounts = {mount["Target"]: (mount["Source"], mount["ReadOnly"]) for mount in options["mounts"]}
        assert mounts == {"/data": ("/data", True), "/runs": ("/runs", False)}
        assert options["mem_limit"] == "65536m" and options["nano_cpus"] == 16 * 10**9
        assert options["device_requests"][0]["Count"] == 4
        assert options["restart_policy"] == {"Name": "on-failure", "MaximumRetryCount": 3}
        check_command(container.command[2], job, arguments)


def pods(request: Any, retries: int) -> list[dict[str, Any]]:
    """The containers of a Volcano job, one for each node; retries: what the job must say."""
    (document,) = yaml.safe_load_all(str(request))
    assert document["kind"] == "Job" and document["spec"]["maxRetry"] == retries
    containers = [task["template"]["spec"]["containers"] for task in document["spec"]["tasks"]]
    assert all(len(of_a_pod) == 1 for of_a_pod in containers)
    return [container for (container,) in containers]


def environment(pod: dict[str, Any]) -> dict[str, str | None]:
    """Variables of a pod's container."""
    return {entry["name"]: entry.get("value") for entry in pod["env"]}


@VOLCANO
@pytest.mark.parametrize("job", list(JOBS))
def test_kubernetes_gets_ranks_resources_mounts_environment_and_retries(job: str, dryrun: Any) -> None:
    given, arguments = JOBS[job]
    found = pods(dryrun(job, [*given, *ON_NODES, *MOUNTS, "--", "--seed", "1"], "kubernetes"), retries=3)
    assert len(found) == 2
    for pod in found:
        assert pod["image"] == "hllm:1"
        limits = pod["resources"]["limits"]
        assert (limits["cpu"], limits["memory"], limits["nvidia.com/gpu"]) == ("16000m", "65536M", "4")
        assert {"NCCL_DEBUG": "INFO", "X": "1", "PET_MAX_RESTARTS": "2"}.items() <= environment(pod).items()
        mounts = {mount["mountPath"]: mount.get("readOnly") for mount in pod["volumeMounts"]}
        assert mounts["/data"] is True and not mounts["/runs"]
        check_command(pod["command"][2], job, arguments)


@VOLCANO
def test_prepare_is_one_process_and_no_rank(dryrun: Any) -> None:
    given = ["--source", "ml-1m", "--path", "/data/ml-1m", "--output", "/data/out", "--split", "leave_one_out"]
    given += ["--cpu", "4", "--memMB", "4096", "--max_retries", "1", "--env", "A=b", "--image", "hllm:1"]
    wanted = "--source ml-1m --output /data/out --split leave_one_out --path /data/ml-1m --overwrite".split()
    command = ["python", "-m", "hllm_torchrec.launch.prepare", *wanted]
    (container,) = dryrun("prepare", [*given, *MOUNTS, "--", "--overwrite"], "local_docker").containers
    assert container.command == command
    assert container.kwargs["environment"]["A"] == "b" and container.kwargs["mem_limit"] == "4096m"
    assert container.kwargs["restart_policy"] == {"Name": "on-failure", "MaximumRetryCount": 1}
    assert {mount["Target"] for mount in container.kwargs["mounts"]} == {"/data", "/runs"}
    request = dryrun("prepare", [*given, "--", "--overwrite"], "slurm")
    (replica,) = request.replicas.values()
    assert [replica.entrypoint, *replica.args] == command and request.max_retries == 1
    assert (replica.env["A"], replica.sbatch_opts["mem"], replica.sbatch_opts["cpus-per-task"]) == ("b", "4096", "4")
    (pod,) = pods(dryrun("prepare", [*given, *MOUNTS, "--", "--overwrite"], "kubernetes"), retries=1)
    assert pod["command"] == command and environment(pod)["A"] == "b"
    assert (pod["resources"]["limits"]["cpu"], pod["resources"]["limits"]["memory"]) == ("4000m", "4096M")
    assert {"/data", "/runs"} <= {mount["mountPath"] for mount in pod["volumeMounts"]}


def test_cluster_is_one_process(dryrun: Any) -> None:
    given = ["--users", "/stores/users", "--output", "/stores/clusters", "--clusters", "64", "--", "--seed", "3"]
    (replica,) = dryrun("cluster", given, "slurm").replicas.values()
    command = [replica.entrypoint, *replica.args]
    assert command[:3] == ["python", "-m", "hllm_torchrec.launch.cluster"]
    parsed = cluster_parser().parse_args(command[3:])
    assert (str(parsed.users), str(parsed.output), parsed.clusters, parsed.seed) == (
        "/stores/users",
        "/stores/clusters",
        64,
        3,
    )
    (replica,) = dryrun("cluster", given[:4], "slurm").replicas.values()
    assert cluster_parser().parse_args(replica.args[2:]).clusters is None


@VOLCANO
def test_serve_is_one_process_per_replica_with_events_of_its_own(dryrun: Any) -> None:
    given = ["--run_dir", "/runs/nights/current/run", "--token_file", "/secrets/token", "--state", "/state"]
    given += ["--port", "8500", "--replicas", "2", "--cpu", "4", "--image", "hllm:1", *MOUNTS, "--", "--watch", "60"]
    commands = [container.command for container in dryrun("serve", given, "local_docker").containers]
    commands += [pod["command"] for pod in pods(dryrun("serve", given, "kubernetes"), retries=0)]
    commands += [[r.entrypoint, *r.args] for r in dryrun("serve", given, "slurm").replicas.values()]
    for number, command in enumerate(commands):
        assert command[:3] == ["python", "-m", "hllm_torchrec.launch.serve"]
        parsed = serve_parser().parse_args(command[3:])
        assert (str(parsed.run), parsed.host, parsed.port) == ("/runs/nights/current/run", "0.0.0.0", 8500)
        assert (str(parsed.token_file), parsed.watch) == ("/secrets/token", 60)
        assert number >= 4 or str(parsed.state) == f"/state/events-{number % 2}.sqlite"
    states = [command[command.index("--state") + 1] for command in commands]
    assert len(states) == 6 and all(len(set(states[at : at + 2])) == 2 for at in (0, 2, 4)), states


@VOLCANO
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_three_stages_are_four_commands_on_the_same_nodes(scheduler: str, dryrun: Any) -> None:
    given = ["--one", "a.yaml", "--two", "b.yaml", "--folder", "/runs/x", *ON_NODES, "--", "--seed", "1"]
    request = dryrun("three_stages", given, scheduler)
    if scheduler == "slurm":
        commands = [replica.args[1] for replica in request.replicas.values()]
    elif scheduler == "kubernetes":
        commands = [pod["command"][2] for pod in pods(request, retries=3)]
    else:
        commands = [container.command[2] for container in request.containers]
    assert len(commands) == 2
    for command in commands:
        steps = [torchrun(step) for step in command.split(" && ")]
        ports = [options["--rdzv_endpoint"].rsplit(":", 1)[1] for options, _ in steps]
        assert ports == ["29600", "29601", "29602", "29603"]
        assert all((options["--nnodes"], options["--nproc_per_node"]) == ("2", "4") for options, _ in steps)
        begun = "--start_from /runs/x/one --item_llm.store /runs/x/items --resume true --seed 1"
        assert [" ".join(rest).removeprefix("hllm_torchrec.launch.") for _, rest in steps] == [
            "train --config a.yaml --output /runs/x/one --resume true --seed 1",
            "embed --run-dir /runs/x/one --items /runs/x/items --checkpoint best",
            f"train --config b.yaml --output /runs/x/two {begun}",
            "embed --run-dir /runs/x/two --items /runs/x/items --users /runs/x/users --checkpoint best",
        ]


def test_the_nightlys_name_of_the_component_is_taken_where_there_is_one(
    dryrun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchx.components import dist

    own = getattr(dist, "torchrun", None) or dist.ddp

    def torchrun(*arguments: str, m: str, **others: Any) -> specs.AppDef:
        app = own(*arguments, m=m, **others)
        app.roles[0].env["FROM"] = "torchrun"
        return app

    monkeypatch.setattr(dist, "torchrun", torchrun, raising=False)
    request = dryrun("embed", ["--run_dir", "r", "--items", "i"], "local_docker")
    assert request.containers[0].kwargs["environment"]["FROM"] == "torchrun"


@pytest.mark.slow
def test_embed_runs_on_two_ranks(dryrun: Any, root: Path, tmp_path: Path) -> None:
    """What the component's command runs; that TorchX runs such a command is in test_evaluate_files.py."""
    train(config(tmp_path / "run", stages=[{"name": "first", "epochs": 0.5}], evaluation__batch_users=24))
    destroy_distributed()
    given = ["--j", "1x2", "--run_dir", str(tmp_path / "run"), "--items", "items", "--users", "users"]
    (replica,) = dryrun("embed", given, "slurm").replicas.values()
    options, (module, *arguments) = torchrun(replica.args[1])
    assert options["--nproc_per_node"] == "2"
    said = run_job(module, arguments, 2, root, tmp_path)[0][0]
    items, users = (len(fixtures.dataset().items), len(fixtures.dataset().users))
    assert re.search(rf"embedded {items} of {items} items in .*; items is at version 1", said), said
    assert re.search(rf"embedded {users} of {users} active users .*; users is at version 1", said), said
    for name, number in (("items", items), ("users", users)):
        store = EmbeddingStore.open(tmp_path / name)
        assert len(store.snapshot()) == number and len(store.snapshot().segments) == 2, "each rank has written a run"
