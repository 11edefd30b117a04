"""The error that a request is answered with."""

from collections.abc import Mapping

from starlette.exceptions import HTTPException


class RequestError(HTTPException):
    """What is wrong with a request, or why it cannot be served now.

    Args:
        status: HTTP's.
        code: a word for programs.
        message: a sentence for people: what was expected, and what came.
        headers: more headers of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(status, message, headers=dict(headers or {}))
        self.code = code
