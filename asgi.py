"""The ASGI entry point: ``uvicorn asgi:app``, of the extra ``async``."""

import gc

from app.asgi import create_app
from app.asgi.outside import Outside
from app.errors import ConfigurationError

try:
    app = Outside(create_app())
except ConfigurationError as error:
    raise SystemExit(f"rollcall: {error}") from None

# As in wsgi.py.
gc.freeze()
