"""A get-or-create mixin as articles about legacy Flask applications write it.

A session of its own is set to SERIALIZABLE, once; then look up, add, commit, and on an error of the
database sleep a tenth of a second and try again. The table cannot have a unique constraint: that is
where such articles begin. They give it no index either. From its second attempt on the loop runs at
READ COMMITTED, so that it makes duplicates; only its speed is looked at here.
"""

from __future__ import annotations

import os
import time
from typing import Any

import click
from flask import Flask
from flask_restx import Api, Resource, reqparse
from flask_sqlalchemy import SQLAlchemy
from marshmallow import Schema, fields
from sqlalchemy import ForeignKey, Index, String, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

MAX_RETRY = 50


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)
app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = make_url(os.environ["DATABASE_URL"]).set(
    drivername="postgresql+psycopg2"
)
db.init_app(app)
api = Api(app)


class GetOrCreateMixin:
    def get_or_create(self, **key: Any) -> Any:
        """Return the record of this key, or this one, stored."""
        model = type(self)
        session = Session(db.engine)
        session.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
        retries = 0
        while True:
            try:
                if session.query(model).filter_by(**key).first() is None:
                    session.add(self)
                session.commit()
                session.close()
                break
            except OperationalError:
                session.rollback()
                time.sleep(0.1)
                retries += 1
                if retries > MAX_RETRY:
                    session.close()
                    raise
        # The request's session is another one, so the record is loaded there.
        return db.session.query(model).filter_by(**key).first()


class Department(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(255))


class Employee(GetOrCreateMixin, db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(255))
    department_id: Mapped[int] = mapped_column(ForeignKey(Department.id))
    title: Mapped[str | None] = mapped_column(String(255))


class EmployeeSchema(Schema):
    id = fields.Integer()
    name = fields.String()
    department_id = fields.Integer()
    title = fields.String()


schema = EmployeeSchema()
parser = reqparse.RequestParser()
parser.add_argument("name", type=str, required=True, location="json")
parser.add_argument("department_id", type=int, required=True, location="json")
parser.add_argument("title", type=str, location="json")


@api.route("/api/v1/employees")
class Employees(Resource):
    @api.expect(parser)
    def post(self) -> Any:
        """Create an employee, or return the one of this name and department."""
        wanted = Employee(**parser.parse_args())
        found = wanted.get_or_create(name=wanted.name, department_id=wanted.department_id)
        return schema.dump(found)


@app.cli.command()
@click.option("--index", is_flag=True, help="With an index on the name.")
def create_tables(index: bool) -> None:
    """Create the tables."""
    db.create_all()
    if index:
        Index("ix_employee_name", Employee.name).create(db.engine)
