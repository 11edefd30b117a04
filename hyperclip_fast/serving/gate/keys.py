"""API keys: who may ask, who may change tasks, and how often.

    python -m hyperclip_fast.serving.gate.keys admin laptop >> keys.txt

A key is 32 random bytes, so its SHA-256 is all that a server needs to know it again, and tells nobody the key.
"""

import argparse
import hashlib
import hmac
import math
import re
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hyperclip_fast.serving.errors import RequestError
from hyperclip_fast.serving.http_errors import error_response

ROLES = ("classify", "admin")  # admin may do what classify may, and change tasks
LINE = re.compile(r"(classify|admin):([0-9a-f]{64})(?::([\w .@-]{1,60}))?")
OPEN = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")  # nothing there tells of tasks or images
ASKING = ("/v1/classify", "/v1/embed")


@dataclass(frozen=True)
class Key:
    """One key.

    Args:
        role: "classify" or "admin".
        digest: SHA-256 of the key.
        name: whose it is, for the log.
    """

    role: str
    digest: bytes
    name: str


def read_keys(path: str | Path) -> tuple[Key, ...]:
    """Keys from a file with a line `role:sha256:name` each; the name may be left out, lines with # are comments.

    Raises:
        ValueError: for a file without keys, or with another line, a key twice, or a name twice.
    """
    keys: list[Key] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = LINE.fullmatch(text)
        if not found:  # the line itself is not shown: somebody may have put the key there
            raise ValueError(f"--api-key-file must have lines role:sha256:name, line {number} of {path} is none")
        role, digest, name = found.groups()
        key = Key(role, bytes.fromhex(digest), name or f"line {number}")
        if any(key.digest == other.digest or key.name == other.name for other in keys):
            raise ValueError(f"--api-key-file must have each key and each name once, line {number} of {path} repeats")
        keys.append(key)
    if not keys:
        raise ValueError(f"--api-key-file must hold at least one key, {path} has none")
    return tuple(keys)


def new_key(role: str, name: str) -> tuple[str, str]:
    """A key, and its line for the file."""
    key = secrets.token_urlsafe(32)
    return key, f"{role}:{hashlib.sha256(key.encode()).hexdigest()}:{name}"


class Keys:
    """Refuses requests without a key, 401, with a key of too small a role, 403, or too many of one key, 429.

    Args:
        app: what comes behind.
        keys: those that are known; none: everybody may do everything.
        rate: requests a second of one key; in a burst as many as in a second, at least one. None: as many as it likes.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[Key], rate: float | None = None):
        self.app, self.keys, self.rate = app, tuple(keys), rate
        self._left: dict[str, tuple[float, float]] = {}  # requests that a key has left, and when that was counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.keys:
            try:
                self._check(scope)
            except RequestError as error:
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        role = needed_role(scope["method"], scope["path"])
        if role is None:
            return
        key = self._find(Headers(scope=scope).get("authorization", ""))
        if key is None:
            message = "the request must carry one of the server's keys as Authorization: Bearer KEY"
            raise RequestError(401, "unauthorized", message, {"WWW-Authenticate": "Bearer"})
        scope["hyperclip_key"] = key.name
        if ROLES.index(key.role) < ROLES.index(role):
            raise RequestError(403, "forbidden", f"the key must have the role {role} for this, it has {key.role}")
        self._count(key)

    def _find(self, header: str) -> Key | None:
        """The key in a header; how long the search takes depends on the number of keys alone."""
        scheme, _, text = header.partition(" ")
        digest = hashlib.sha256(text.strip().encode("latin-1")).digest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found if scheme.lower() == "bearer" else None

    def _count(self, key: Key) -> None:
        if self.rate is None:
            return
        now, most = time.monotonic(), max(1.0, self.rate)
        left, since = self._left.get(key.name, (most, now))
        left = min(most, left + (now - since) * self.rate)
        if left < 1:
            self._left[key.name] = left, now
            message = f"a key may send {self.rate:g} requests a second: come again later"
            raise RequestError(429, "too_many", message, {"Retry-After": str(math.ceil((1 - left) / self.rate))})
        self._left[key.name] = left - 1, now


def needed_role(method: str, path: str) -> str | None:
    """The role that a request needs; None: no key at all."""
    reads = method in ("GET", "HEAD")
    if reads and path in OPEN:
        return None
    return "classify" if reads or (method == "POST" and path in ASKING) else "admin"


def main() -> None:
    """Print a new key on stderr, and its line for the file on stdout."""
    parser = argparse.ArgumentParser(prog="python -m hyperclip_fast.serving.gate.keys", description="Make an API key.")
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("name", help="whose key it is")
    args = parser.parse_args()
    key, line = new_key(args.role, args.name)
    if not LINE.fullmatch(line):
        parser.error(f"name must be 1 to 60 letters, digits, spaces or any of .@-_, got {args.name!r}")
    print(f"the key, which is stored nowhere: {key}", file=sys.stderr)
    print(line)


if __name__ == "__main__":
    main()
