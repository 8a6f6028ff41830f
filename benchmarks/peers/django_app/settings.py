"""Django's settings: what a JSON API needs, and nothing that would only cost time."""

import os
from urllib.parse import parse_qs, urlsplit

database = urlsplit(os.environ["DATABASE_URL"])
place = parse_qs(database.query)

SECRET_KEY = "nothing is signed here"  # noqa: S105 - the benchmark's own
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1"]
INSTALLED_APPS = ["rest_framework", "benchmarks.peers.django_app"]
MIDDLEWARE: list[str] = []
ROOT_URLCONF = "benchmarks.peers.django_app.urls"
USE_TZ = True
USE_I18N = False
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": database.path.lstrip("/"),
        "USER": database.username,
        "HOST": place["host"][0],
        "PORT": place["port"][0],
        "CONN_MAX_AGE": None,  # connections stay open
    }
}
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [],
    "DEFAULT_PERMISSION_CLASSES": [],
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "UNAUTHENTICATED_USER": None,  # so that django.contrib.auth need not be installed
}
