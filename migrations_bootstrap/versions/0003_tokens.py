"""Create the table of tokens, beside the departments."""

from alembic import context, op

from migrations_bootstrap import catalogue

revision = "0003"
down_revision = "0002"

CREATE = """
CREATE TABLE {schema}.rollcall_token (
    id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT pk_rollcall_token PRIMARY KEY,
    name text NOT NULL CONSTRAINT uq_rollcall_token_name UNIQUE,
    sha256 bytea NOT NULL CONSTRAINT uq_rollcall_token_sha256 UNIQUE,
    scope text NOT NULL
        CONSTRAINT ck_rollcall_token_scope CHECK (scope IN ('read', 'write', 'admin')),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    last_used_on date
)
"""


def upgrade() -> None:
    connection = op.get_bind()
    table = catalogue.get_table(connection, "department")
    schema = connection.dialect.identifier_preparer.quote_identifier(table.schema)
    connection.exec_driver_sql(CREATE.format(schema=schema))
    context.config.attributes["changes"].append("created the table of tokens")
