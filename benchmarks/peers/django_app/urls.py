"""The one path."""

from django.urls import path

from benchmarks.peers.django_app.views import Employees

urlpatterns = [path("api/v1/employees", Employees.as_view())]
