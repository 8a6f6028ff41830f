# syntax=docker/dockerfile:1

FROM python:3.13-slim-bookworm AS build
WORKDIR /src
COPY setup.cfg setup.py README.md ./
COPY app ./app
COPY migrations_bootstrap ./migrations_bootstrap
RUN python -m venv /opt/rollcall \
    && /opt/rollcall/bin/pip install --no-cache-dir .

FROM python:3.13-slim-bookworm
ENV PATH=/opt/rollcall/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    BIND=0.0.0.0 \
    PORT=8000
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin rollcall
COPY --from=build /opt/rollcall /opt/rollcall
WORKDIR /srv/rollcall
COPY wsgi.py gunicorn.conf.py ./
# Tokens are asked for: give the first one as a file and say where, ROLLCALL_ADMIN_TOKEN_FILE.
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Asks PORT, without a shell; BIND has to be a plain host for that.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/healthz', timeout=2)"]
CMD ["gunicorn", "wsgi:app"]
