# v4jax on NVIDIA GPUs. Hardware: H100, H200 or B200 with a driver for CUDA 13 (580 or newer); CUDA comes with the
# Python packages of the extra, so the base image needs none.
#
#   docker build -f launch/docker/cuda.Dockerfile -t v4jax-cuda .
#   docker run --rm --gpus=all --shm-size=16g -v "$PWD/runs:/runs" v4jax-cuda train --config=tiny --workdir=/runs/tiny
FROM python:3.12-slim
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /v4jax
COPY pyproject.toml README.md ./
COPY .github/LICENSE .github/
COPY v4jax v4jax
COPY configs configs
RUN pip install '.[cuda]'
ENTRYPOINT ["v4jax"]
CMD ["--help"]
