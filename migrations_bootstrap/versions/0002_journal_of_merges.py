"""Create the journal of merges, beside the departments.

Where somebody has merged with a library version before, it is there already.
"""

from alembic import context, op

from migrations_bootstrap import catalogue

revision = "0002"
down_revision = "0001"

# As app/duplicates/journal.py has it, which makes it for tables that no revision knows.
CREATE = """
CREATE TABLE IF NOT EXISTS {schema}.rollcall_merge (
    id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT pk_rollcall_merge PRIMARY KEY,
    action text NOT NULL,
    table_name text NOT NULL,
    kept jsonb,
    duplicates jsonb NOT NULL,
    made_by text NOT NULL DEFAULT session_user,
    made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    undone_by text,
    undone_at timestamptz,
    purged_at timestamptz
);
CREATE INDEX IF NOT EXISTS ix_rollcall_merge_duplicates
    ON {schema}.rollcall_merge USING gin (duplicates jsonb_path_ops);
CREATE TABLE IF NOT EXISTS {schema}.rollcall_change (
    merge_id bigint NOT NULL CONSTRAINT fk_rollcall_change_merge_id_rollcall_merge
        REFERENCES {schema}.rollcall_merge (id),
    step integer NOT NULL,
    number bigint GENERATED ALWAYS AS IDENTITY,
    table_name text NOT NULL,
    row_key jsonb,
    before jsonb NOT NULL,
    after jsonb,
    CONSTRAINT pk_rollcall_change PRIMARY KEY (merge_id, step, number)
);
"""


def upgrade() -> None:
    connection = op.get_bind()
    table = catalogue.get_table(connection, "department")
    schema = connection.dialect.identifier_preparer.quote_identifier(table.schema)
    connection.exec_driver_sql(CREATE.format(schema=schema))
    context.config.attributes["changes"].append("created the journal of merges")
