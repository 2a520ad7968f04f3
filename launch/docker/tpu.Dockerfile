# v4jax on Cloud TPUs. Hardware: hosts of TPU v5e, v5p, v6e or tpu7x (Ironwood); libtpu comes with the extra.
#
#   docker build -f launch/docker/tpu.Dockerfile -t v4jax-tpu .
#   docker run --rm --privileged --net=host -v "$PWD/runs:/runs" v4jax-tpu train --config=tiny --workdir=/runs/tiny
FROM python:3.12-slim
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /v4jax
COPY pyproject.toml README.md ./
COPY .github/LICENSE .github/
COPY v4jax v4jax
COPY configs configs
# hadolint ignore=DL3013
RUN pip install '.[tpu]'
# As root, who alone may open the TPU's devices.
WORKDIR /runs
# Kubernetes ends a pod with SIGTERM; v4jax is process 1 and saves on it.
ENTRYPOINT ["v4jax"]
CMD ["--help"]
