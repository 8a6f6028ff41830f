"""Create departments and employees, or adopt the tables that a legacy application has.

There is no way down: what was adopted was not ours to drop.
"""

import sqlalchemy as sa
from alembic import context, op

from migrations_bootstrap.adoption import create_or_adopt

revision = "0001"
down_revision = None

# A copy of the models as they were: a revision must not change when they do.
metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    }
)


def _bookkeeping(table: str) -> list[sa.Column[object]]:
    """Return the columns that tell duplicates and creators of a row."""
    return [
        sa.Column("duplicate_of_id", sa.BigInteger, sa.ForeignKey(f"{table}.id")),
        sa.Column("creation_token", sa.Uuid),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now()),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.func.now()),
    ]


sa.Table(
    "department",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("name", sa.String(255), nullable=False),
    *_bookkeeping("department"),
)
sa.Table(
    "employee",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column(
        "department_id",
        sa.BigInteger,
        sa.ForeignKey("department.id", ondelete="CASCADE"),
        nullable=False,
    ),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("title", sa.String(255)),
    sa.Column("email", sa.String(320)),
    sa.Column("hired_on", sa.Date),
    sa.Column("manager_id", sa.BigInteger, sa.ForeignKey("employee.id", ondelete="SET NULL")),
    *_bookkeeping("employee"),
)


def upgrade() -> None:
    changes: list[str] = context.config.attributes["changes"]
    changes += create_or_adopt(op.get_bind(), metadata)
