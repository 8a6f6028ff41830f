"""Employees over HTTP."""

from __future__ import annotations

from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from benchmarks.peers.django_app.models import Employee


class EmployeeSerializer(serializers.Serializer):
    """Not a ModelSerializer: that asks the database whether the key is free, and refuses if not."""

    id = serializers.IntegerField(read_only=True)
    name = serializers.CharField(max_length=255)
    department_id = serializers.IntegerField()
    title = serializers.CharField(max_length=255, required=False, allow_null=True)


class Employees(APIView):
    def post(self, request: Request) -> Response:
        """Find or create an employee."""
        serializer = EmployeeSerializer(data=request.data)
        serializer.is_valid(raise_exception=True)
        given = dict(serializer.validated_data)
        key = {name: given.pop(name) for name in ("department_id", "name")}
        employee, created = Employee.objects.get_or_create(**key, defaults=given)
        return Response(EmployeeSerializer(employee).data, status=201 if created else 200)
