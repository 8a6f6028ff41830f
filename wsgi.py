"""The WSGI entry point: ``gunicorn wsgi:app``; ``flask`` finds the application here as well."""

from app import create_app
from app.errors import ConfigurationError

try:
    app = create_app()
except ConfigurationError as error:
    raise SystemExit(f"rollcall: {error}") from None
