"""What schemathesis has to know of the document, by SCHEMATHESIS_HOOKS."""

from __future__ import annotations

from typing import Any

import schemathesis

WITHOUT_CONTENT = (204, 304)


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Swagger 2 gives the type of content by operation: what has no content needs none."""
    if response.status_code in WITHOUT_CONTENT:
        assert "content-type" not in response.headers
        response.headers["content-type"] = ["application/problem+json"]
