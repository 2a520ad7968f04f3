# v4jax on CPUs. Hardware: any x86-64 or Arm machine with Linux; tried sizes: 2 cores and 8 GB for `tiny`.
#
#   docker build -f launch/docker/cpu.Dockerfile -t v4jax-cpu .
#   mkdir -p runs  # or Docker makes it, and root owns it
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/runs:/runs" v4jax-cpu train --config=tiny --workdir=/runs/tiny
FROM python:3.12-slim
# A quarter of the time of XLA on CPUs goes into page faults; huge pages save most of it.
ENV GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /v4jax
COPY pyproject.toml README.md ./
COPY .github/LICENSE .github/
COPY v4jax v4jax
COPY configs configs
RUN pip install .
# Any user may run the image (--user) and needs a home for caches; /runs is where a volume belongs.
RUN useradd --uid 1000 --create-home user && chmod 1777 /home/user && mkdir /runs && chown 1000:1000 /runs
ENV HOME=/home/user
USER 1000:1000
WORKDIR /runs
ENTRYPOINT ["v4jax"]
CMD ["--help"]
