# syntax=docker/dockerfile:1
# The server: no torch, no compiler, nothing that runs as root. From the root of the repository:
#   docker build -f docker/server.Dockerfile -t diloco-server .

FROM python:3.13-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY proto proto
COPY server server
COPY client client
COPY cli cli
# The environment has no pip of its own; the one of this stage installs into it.
RUN python -m venv --without-pip /opt/diloco \
 && pip --python /opt/diloco/bin/python install --no-cache-dir -c constraints.txt .

FROM python:3.13-slim-bookworm
# The same number in both images: workers read the join URL, which only its owner may.
RUN useradd --uid 10001 --user-group --no-log-init --no-create-home diloco \
 && install -d -m 0700 -o diloco -g diloco /var/lib/diloco /var/cache/diloco /run/diloco
COPY --from=build /opt/diloco /opt/diloco
ENV PATH=/opt/diloco/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DILOCO_HOST=0.0.0.0 \
    DILOCO_STATE_DIR=/var/lib/diloco \
    NUMBA_CACHE_DIR=/var/cache/diloco
# The kernels are compiled at the first start and not here: machine code holds for one model of CPU, numba compiles anew
# on any other, and code that holds for all of them would do without AVX.
USER 10001:10001
VOLUME ["/var/lib/diloco"]
EXPOSE 50051
# More than --drain-seconds (30) from here to SIGKILL: `docker stop --time 45`, stop_grace_period in compose.
STOPSIGNAL SIGTERM
# On loopback the server is asked by its own certificate; the question needs no token.
HEALTHCHECK --interval=10s --timeout=6s --start-period=120s --retries=3 \
    CMD ["diloco-client", "health", "127.0.0.1:50051", "--ca-cert", "/var/lib/diloco/tls/cert.pem"]
ENTRYPOINT ["diloco-server"]
