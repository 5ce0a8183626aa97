# syntax=docker/dockerfile:1
# A worker: torch and the client. It trains examples/plain.py unless it is told otherwise. From the root of the repository:
#   docker build -f docker/worker.Dockerfile -t diloco-worker .
# torch is the build with CUDA that pip finds by itself; --build-arg TORCH_INDEX=URL names an index of PyTorch's with another,
# such as the much smaller one for CPUs (docs/containers.md).

FROM python:3.13-slim-bookworm AS build
ARG TORCH_INDEX=
WORKDIR /src
COPY constraints.txt ./
# torch in a layer of its own: it is the larger part, and changes seldom.
RUN python -m venv --without-pip /opt/diloco \
 && PIP_EXTRA_INDEX_URL=$TORCH_INDEX pip --python /opt/diloco/bin/python install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY server server
COPY client client
COPY cli cli
RUN pip --python /opt/diloco/bin/python install --no-cache-dir -c constraints.txt '.[torch]'

FROM python:3.13-slim-bookworm
RUN useradd --uid 10001 --user-group --no-log-init --no-create-home diloco \
 && install -d -m 0700 -o diloco -g diloco /work /var/cache/diloco /run/diloco
COPY --from=build /opt/diloco /opt/diloco
COPY examples/plain.py /opt/diloco/examples/plain.py
ENV PATH=/opt/diloco/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/var/cache/diloco
WORKDIR /work
USER 10001:10001
# With it a worker pushes what it has and leaves; plain.py takes 30 seconds at most.
STOPSIGNAL SIGTERM
# Whether a worker does well shows in `diloco-client status`, not from within.
HEALTHCHECK NONE
CMD ["python", "/opt/diloco/examples/plain.py"]
