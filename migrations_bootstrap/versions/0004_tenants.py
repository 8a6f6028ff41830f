"""Create the registry of tenants, and let a token belong to one of them.

The registry of the service's own database is the one that counts. A tenant's database has the same
tables, and nobody uses them there: one line of revisions is simpler than two.
"""

from alembic import context, op

from migrations_bootstrap import catalogue

revision = "0004"
down_revision = "0003"

CHANGE = """
CREATE TABLE {schema}.rollcall_tenant (
    id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT pk_rollcall_tenant PRIMARY KEY,
    name text NOT NULL CONSTRAINT uq_rollcall_tenant_name UNIQUE,
    database text NOT NULL CONSTRAINT uq_rollcall_tenant_database UNIQUE,
    database_oid bigint NOT NULL,
    owner text,
    state text NOT NULL CONSTRAINT ck_rollcall_tenant_state
        CHECK (state IN ('creating', 'ready', 'dropping')),
    created_at timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE {schema}.rollcall_token
    ADD COLUMN tenant text CONSTRAINT fk_rollcall_token_tenant_rollcall_tenant
        REFERENCES {schema}.rollcall_tenant (name) ON DELETE CASCADE;
"""


def upgrade() -> None:
    connection = op.get_bind()
    table = catalogue.get_table(connection, "department")
    schema = connection.dialect.identifier_preparer.quote_identifier(table.schema)
    connection.exec_driver_sql(CHANGE.format(schema=schema))
    context.config.attributes["changes"].append("created the registry of tenants")
