# v4jax on NVIDIA GPUs. Hardware: H100, H200 or B200 with a driver for CUDA 13 (580 or newer); CUDA comes with the
# Python packages of the extra, so the base image needs none.
#
#   docker build -f launch/docker/cuda.Dockerfile -t v4jax-cuda .
#   mkdir -p runs  # or Docker makes it, and root owns it
#   docker run --rm --user "$(id -u):$(id -g)" --gpus=all --shm-size=16g -v "$PWD/runs:/runs" \
#     v4jax-cuda train --config=tiny --workdir=/runs/tiny
FROM python:3.12-slim
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /v4jax
COPY pyproject.toml README.md ./
COPY .github/LICENSE .github/
COPY v4jax v4jax
COPY configs configs
# hadolint ignore=DL3013
RUN pip install '.[cuda]'
# Any user may run the image (--user) and needs a home for caches; /runs is where a volume belongs.
RUN useradd --uid 1000 --create-home user && chmod 1777 /home/user && mkdir /runs && chown 1000:1000 /runs
ENV HOME=/home/user
USER 1000:1000
WORKDIR /runs
ENTRYPOINT ["v4jax"]
CMD ["--help"]
