"""Alembic's environment: everything comes from the caller, nothing from an ini file or the shell.

config.attributes holds `connection`, `version_table`, `lock_timeout` (seconds), `changes` (a list
that revisions add readable lines to) and, for a comparison with models, `target_metadata`.
"""

from alembic import context

from migrations_bootstrap.lock import NO_TIMEOUTS

attributes = context.config.attributes
connection = attributes["connection"]

context.configure(
    connection=connection,
    target_metadata=attributes.get("target_metadata"),
    version_table=attributes["version_table"],
)
with context.begin_transaction():
    # LOCAL: a setting of the session would stay behind on a pooled server connection.
    connection.execute(NO_TIMEOUTS, {"local": True})
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{attributes['lock_timeout']}s'")
    context.run_migrations()
