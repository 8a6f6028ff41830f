"""``python -m benchmarks.peers.django_app migrate``: create the tables."""

import os

import django
from django.core.management import call_command

os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.peers.django_app.settings"
django.setup()
# No migrations are kept for two tables that are only ever made anew.
call_command("migrate", run_syncdb=True, verbosity=0)
