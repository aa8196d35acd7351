"""TorchX components: `torchx run launch/components.py:evaluate --j 1x2 -- --run-dir runs/quickstart`.

TorchX executes this file inside a module of its own, so nothing of the project is imported here.
"""

from typing import Dict, List, Optional  # noqa: UP035 - TorchX reads the annotations, and knows these

from torchx import specs
from torchx.components.dist import ddp


def evaluate(
    *arguments: str,
    run_dir: str = "",
    predictions: Optional[List[str]] = None,  # noqa: UP006, UP045
    baseline: str = "",
    max_drop: float = 0.001,
    j: str = "1x1",
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,  # noqa: N803 - as in TorchX's own components
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    max_retries: int = 0,
) -> specs.AppDef:
    """Offline evaluation: `hllm evaluate` on a checkpoint or on prediction files, on one rank or many.

    Args:
        arguments: further arguments of `hllm evaluate`, after `--`
        run_dir: run directory of `hllm train`
        predictions: NAME=PATH of prediction files, separated by commas
        baseline: a metrics.json to pass against; the job fails if the AUC dropped
        max_drop: the drop of AUC that the baseline allows
        j: nodes x processes, such as 1x2
        image: container image, for the schedulers that need one
        h: a named resource, instead of cpu, gpu and memMB
        cpu: processors of a node
        gpu: accelerators of a node
        memMB: memory of a node in MB
        env: environment variables, NAME=VALUE separated by commas
        max_retries: restarts by the scheduler
    """
    given: List[str] = []  # noqa: UP006
    if run_dir:
        given += ["--run-dir", run_dir]
    if predictions:
        given += ["--predictions", *predictions]
    if baseline:
        given += ["--baseline", baseline, "--max-drop", str(max_drop)]
    return ddp(
        *given,
        *arguments,
        m="hllm_torchrec.launch.evaluate",
        name="/evaluate",
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        j=j,
        env=env,
        max_retries=max_retries,
    )
