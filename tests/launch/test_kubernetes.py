"""The manifest of docs/kubernetes: names that refer to each other, options and paths that the service has."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hllm_torchrec.launch.serve import build_parser

ROOT = Path(__file__).resolve().parents[2]
APP = (ROOT / "hllm_torchrec" / "serving" / "app.py").read_text(encoding="utf-8")


@cache
def objects() -> dict[str, dict[str, Any]]:
    text = (ROOT / "docs" / "kubernetes" / "serve.yaml").read_text(encoding="utf-8")
    return {one["kind"]: one for one in yaml.safe_load_all(text)}


def container() -> dict[str, Any]:
    (found,) = objects()["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    return dict(found)


def test_the_service_gets_options_that_it_has_and_files_that_are_mounted() -> None:
    command = container()
    assert command["command"] == ["hllm", "serve"]
    args = build_parser().parse_args(command["args"])
    mounts = {mount["name"]: mount for mount in command["volumeMounts"]}
    pod, claims = objects()["StatefulSet"]["spec"]["template"]["spec"], objects()["StatefulSet"]["spec"]
    names = {one["name"] for one in pod["volumes"]} | {
        one["metadata"]["name"] for one in claims["volumeClaimTemplates"]
    }
    assert mounts.keys() == names
    for path, name in ((args.state, "state"), (args.token_file, "token"), (args.run, "data")):
        assert path.is_relative_to(mounts[name]["mountPath"])
    # Each replica has events of its own, and no two of them write to one file.
    assert claims["volumeClaimTemplates"][0]["spec"]["accessModes"] == ["ReadWriteOncePod"]
    assert args.port == command["ports"][0]["containerPort"] == objects()["Service"]["spec"]["ports"][0]["port"]


def test_probes_and_route_are_paths_of_the_service() -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        found = container()[probe]["httpGet"]
        assert f'@router.get("{found["path"]}"' in APP and found["port"] == container()["ports"][0]["name"]
    (rule,) = objects()["HTTPRoute"]["spec"]["rules"]
    assert rule["matches"][0]["path"] == {"type": "PathPrefix", "value": "/v1"} and '@router.post("/v1/score"' in APP


def test_requests_are_hashed_by_user_on_the_route_to_the_service() -> None:
    found = objects()
    route, policy = found["HTTPRoute"], found["BackendTrafficPolicy"]["spec"]
    (target,) = policy["targetRefs"]
    assert (target["kind"], target["name"]) == ("HTTPRoute", route["metadata"]["name"])
    assert policy["loadBalancer"]["type"] == "ConsistentHash"
    assert policy["loadBalancer"]["consistentHash"] == {"type": "Header", "header": {"name": "X-User"}}
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    service = found["Service"]
    assert (backend["name"], backend["port"]) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])
    assert route["spec"]["parentRefs"][0]["name"] == found["Gateway"]["metadata"]["name"]
    labels = found["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    selectors = [service["spec"]["selector"], found["StatefulSet"]["spec"]["selector"]["matchLabels"]]
    assert all(
        selector == labels for selector in [*selectors, found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]]
    )
    assert found["StatefulSet"]["spec"]["serviceName"] == service["metadata"]["name"]
