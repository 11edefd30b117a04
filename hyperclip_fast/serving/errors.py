"""The error that a request is answered with; http_errors.py makes it JSON."""

from collections.abc import Mapping


class RequestError(Exception):
    """What is wrong with a request, or why it cannot be served now.

    Args:
        status: HTTP's.
        code: a word for programs.
        message: a sentence for people: what was expected, and what came.
        headers: more headers of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(status, code, message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})

    def __str__(self) -> str:
        return self.message

    @property
    def content(self) -> dict[str, str | int]:
        """What the answer's JSON holds of it."""
        return {"code": self.code, "message": self.message, "status": self.status}
