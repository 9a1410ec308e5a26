# The worker's image. Everything it needs to know comes from the environment (README, "Configuration");
# no secret is built in. `docker run IMAGE cancelctl doctor` works too.

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /build
RUN python -m venv /opt/venv && python -m venv /opt/tools
# First what changes rarely: dependencies as locked, each file checked against its hash.
COPY requirements.lock requirements-dev.lock ./
RUN /opt/venv/bin/pip install --only-binary :all: --require-hashes -r requirements.lock \
    && sed -n '/^setuptools==/,/[^\\]$/p' requirements-dev.lock > setuptools.lock \
    && /opt/tools/bin/pip install --require-hashes -r setuptools.lock
COPY pyproject.toml README.md LICENSE ./
COPY worker worker
RUN /opt/tools/bin/pip wheel --no-deps --no-build-isolation -w dist . \
    && /opt/venv/bin/pip install --no-deps --no-index dist/*.whl \
    && /opt/venv/bin/pip check

FROM python:3.13-slim
LABEL org.opencontainers.image.title="kalshi-cancel" \
      org.opencontainers.image.description="Celery workers that see every Kalshi order cancel through to a known outcome" \
      org.opencontainers.image.licenses="MIT"
# A number, so that Kubernetes can tell that it is not root (runAsNonRoot).
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin worker
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY celeryconfig.py ./
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001
STOPSIGNAL SIGTERM
# Whether Redis answers from here: without it no work can be done. Neither the exchange nor its budget is
# touched; `cancelctl doctor` is the check that looks at everything.
HEALTHCHECK --interval=30s --timeout=5s --start-period=15s --retries=3 \
    CMD ["python", "-c", "from worker.book import *; from worker.settings import RedisSettings; s = RedisSettings.from_env(); Book(connect(s), s).ping()"]
CMD ["celery", "-A", "worker.app", "worker", "--without-gossip", "--without-mingle", "-l", "info"]
