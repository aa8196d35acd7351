# For schedulers that run containers; docs/clusters.md says how.
#
#     docker build --build-arg DEVICE=cpu -t hllm:cpu .
#     docker build --build-arg DEVICE=cuda -t hllm:cuda .    # the host has the driver; torch's wheels have the rest
FROM python:3.11.13-slim-bookworm

ARG DEVICE=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHON=python3 PYTHONUNBUFFERED=1

# A compiler, for Triton and torch.compile.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 hllm \
    && install --directory --owner hllm /opt/hllm

WORKDIR /opt/hllm
COPY --chown=hllm setup.py pyproject.toml README.md LICENSE train.py .torchxconfig ./
COPY --chown=hllm hllm_torchrec hllm_torchrec
COPY --chown=hllm modules modules
COPY --chown=hllm launch launch
COPY --chown=hllm configs configs
COPY --chown=hllm scripts scripts
RUN bash scripts/install.sh "--$DEVICE" --no-venv \
    && python -m pip install --constraint scripts/requirements/constraints.txt \
        faiss-cpu fastapi prometheus_client s3fs uvicorn

USER 1000
CMD ["hllm", "--help"]
