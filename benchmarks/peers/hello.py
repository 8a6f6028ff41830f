"""The floor: a Flask-RESTX resource that reads nothing and answers a constant."""

from __future__ import annotations

from flask import Flask
from flask_restx import Api, Resource

app = Flask(__name__)
api = Api(app)


@api.route("/api/v1/employees")
class Employees(Resource):
    def post(self) -> dict[str, str]:
        """Answer, whatever was asked."""
        return {"hello": "world"}
