"""The WSGI entry point: ``gunicorn wsgi:app``; ``flask`` finds the application here as well."""

import gc

gc.disable()  # until all is loaded: it would walk in vain through what stays, an eighth of the time

from app import create_app  # noqa: E402
from app.errors import ConfigurationError  # noqa: E402

try:
    app = create_app()
except ConfigurationError as error:
    raise SystemExit(f"rollcall: {error}") from None

# What is loaded by now stays as long as the process: the garbage collector need not walk it at each
# full collection, which takes a fifth of the time of a batch.
gc.freeze()
gc.enable()
