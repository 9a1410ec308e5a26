# The worker's image. Everything it needs to know comes from the environment (docs/reference/configuration.md);
# no secret is built in. `docker run IMAGE cancelctl doctor` works too.

FROM python:3.13.9-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /build
# One pip serves both environments; the worker's has none.
RUN python -m venv /opt/tools && python -m venv --without-pip /opt/venv
# First what changes rarely: dependencies as locked, each file checked against its hash.
COPY requirements.lock requirements-dev.lock ./
RUN /opt/tools/bin/pip --python /opt/venv install --only-binary :all: --require-hashes -r requirements.lock \
    && sed -n '/^setuptools==/,/[^\\]$/p' requirements-dev.lock > setuptools.lock \
    && /opt/tools/bin/pip install --require-hashes -r setuptools.lock
COPY pyproject.toml README.md LICENSE ./
COPY kalshi_cancel kalshi_cancel
RUN /opt/tools/bin/pip wheel --no-deps --no-build-isolation -w dist . \
    && /opt/tools/bin/pip --python /opt/venv install --no-deps --no-index dist/*.whl \
    && /opt/tools/bin/pip --python /opt/venv check

FROM python:3.13.9-slim-bookworm
LABEL org.opencontainers.image.title="kalshi-cancel" \
      org.opencontainers.image.description="Celery workers that see every Kalshi order cancel through to a known outcome" \
      org.opencontainers.image.licenses="MIT"
# A number, so that Kubernetes can tell that it is not root (runAsNonRoot).
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin worker
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY celeryconfig.py ./
COPY worker worker
# The heartbeat is in memory, and can be written also where the image may not be (`docker run --read-only`).
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    KALSHI_HEARTBEAT_FILE=/dev/shm/heartbeat
USER 10001
STOPSIGNAL SIGTERM
# Whether the worker lives. Not whether Redis or the exchange answer: a restart would mend neither, and what
# waits for them is held (`/ready`, beside the metrics, tells them apart; `cancelctl doctor` looks at everything).
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s --retries=3 CMD ["cancelctl", "health"]
CMD ["celery", "-A", "worker.app", "worker", "--without-gossip", "--without-mingle", "-l", "info"]
