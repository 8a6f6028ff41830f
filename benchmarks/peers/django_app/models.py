"""Departments and employees."""

from __future__ import annotations

from typing import ClassVar

from django.db import models


class Department(models.Model):
    name = models.CharField(max_length=255, unique=True)

    class Meta:
        db_table = "department"

    def __str__(self) -> str:
        return self.name


class Employee(models.Model):
    department = models.ForeignKey(Department, on_delete=models.CASCADE)
    name = models.CharField(max_length=255)
    title = models.CharField(max_length=255, null=True)

    class Meta:
        db_table = "employee"
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["department", "name"], name="employee_natural_key")
        ]

    def __str__(self) -> str:
        return self.name
