"""The ASGI entry point: ``uvicorn asgi:app``, of the extra ``async``."""

import gc

gc.disable()  # as in wsgi.py

from app.asgi import create_app  # noqa: E402
from app.asgi.outside import Outside  # noqa: E402
from app.errors import ConfigurationError  # noqa: E402

try:
    app = Outside(create_app())
except ConfigurationError as error:
    raise SystemExit(f"rollcall: {error}") from None

# As in wsgi.py.
gc.freeze()
gc.enable()
