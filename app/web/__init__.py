"""HTTP without a framework: what requests mean and how they are answered, for every server."""

BASE = "/api/v1"
