# syntax=docker/dockerfile:1
# A CPU image:  docker build -t qwen2vl-trt .
# A GPU image:  docker build --build-arg BASE=nvidia/cuda:13.0.2-runtime-ubuntu24.04 --build-arg EXTRAS=tensorrt \
#                 --build-arg TORCH_INDEX= -t qwen2vl-trt .
# To ask:       docker run --rm -v "$PWD/artifacts:/data/artifacts" -v "$PWD/photos:/data/photos:ro" qwen2vl-trt \
#                 --model tiny --image photos/a.png --prompt "What digits are in the image?"
# This file has been linted (hadolint), not built.
ARG BASE=debian:bookworm-slim
FROM ${BASE}

# gcc and Python's headers: Triton compiles its launcher where it runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv

# Where PyTorch comes from: its CPU build, or the registry's CUDA build where this is empty.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=compare
WORKDIR /src
COPY constraints.txt ./
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install "$(grep '^torch==' constraints.txt)" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}

COPY pyproject.toml README.md LICENSE ./
COPY qwen2vl_trt ./qwen2vl_trt
COPY export ./export
COPY engines ./engines
COPY runtime ./runtime
COPY configs ./configs
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache/pip pip install --constraint constraints.txt ".[${EXTRAS}]"

RUN useradd --uid 10001 --create-home qwen && mkdir /data && chown qwen /data
USER 10001
WORKDIR /data
ENTRYPOINT ["qwen2vl-trt"]
