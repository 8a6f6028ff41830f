"""The WSGI entry point: ``gunicorn wsgi:app``; ``flask`` finds the application here as well."""

import gc

from app import create_app
from app.errors import ConfigurationError

try:
    app = create_app()
except ConfigurationError as error:
    raise SystemExit(f"rollcall: {error}") from None

# What is loaded by now stays as long as the process: the garbage collector need not walk it at each
# full collection, which takes a fifth of the time of a batch.
gc.freeze()
