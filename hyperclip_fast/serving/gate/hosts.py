"""Which names, paths and pages a server answers."""

import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hyperclip_fast.serving.errors import RequestError
from hyperclip_fast.serving.http_errors import error_response
from hyperclip_fast.utils.class_names import UNPRINTABLE


class KnownHosts:
    """Refuses requests to other names than its own: a page elsewhere may point a name of its own at this machine.

    Args:
        app: what comes behind.
        hosts: names and addresses that clients may call the server by, without a port; "*": any.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str]):
        self.app, self.hosts = app, frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "*" not in self.hosts:
            host = Headers(scope=scope).get("host", "")
            if re.sub(r":\d*$", "", host).lower() not in self.hosts:
                message = f"Host must be a name that this server was told to answer to, got {host[:100]!r}"
                await error_response(RequestError(400, "unknown_host", message))(scope, receive, send)
                return
        await self.app(scope, receive, send)


class PlainPaths:
    """Refuses paths with control characters: a route's pattern would take "pets" and a line's end for "pets"."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and UNPRINTABLE.search(scope["path"]):
            message = f"the path must be of printable characters, got {scope['path'][:100]!r}"
            await error_response(RequestError(404, "not_found", message))(scope, receive, send)
            return
        await self.app(scope, receive, send)


class OwnPages:
    """Refuses what pages of other origins have a browser send: they could change tasks, or load the model.

    A browser says in Sec-Fetch-Site whose page it is, and in Origin where it is from; programs send neither. Whatever
    only reads goes through: without CORS no page of another origin sees the answer.

    Args:
        app: what comes behind.
        origins: origins whose pages may, as "https://here.example"; "*": any.
    """

    def __init__(self, app: ASGIApp, origins: Iterable[str]):
        self.app, self.origins = app, frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD") and not self._is_own(scope):
            origin = Headers(scope=scope).get("origin", "another one")
            message = f"the request must come from a page of this server, or from no page, got origin {origin[:100]!r}"
            await error_response(RequestError(403, "other_origin", message))(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_own(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        origin, site = headers.get("origin", "").lower(), headers.get("sec-fetch-site")
        if "*" in self.origins or origin in self.origins:
            return True
        if site is not None:
            return site in ("same-origin", "none")
        return not origin or origin.partition("://")[2] == headers.get("host", "").lower()
