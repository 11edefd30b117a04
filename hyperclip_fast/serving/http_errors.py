"""Errors of the server, all as one JSON object: {"error": {"code", "message", "status"}}; the web framework's, too."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hyperclip_fast.serving.errors import RequestError


def error_response(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as JSON."""
    content = {"error": {"code": code, "message": message, "status": status}}
    return JSONResponse(content, status, headers=dict(headers or {}))


def add_error_handlers(app: FastAPI) -> None:
    """Every error of an app becomes JSON."""
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal)


async def _request_error(request: Request, error: Any) -> JSONResponse:
    return error_response(error.status, error.code, error.message, error.headers)


async def _http_error(request: Request, error: Any) -> JSONResponse:
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    message = error.detail
    if error.status_code in (404, 405):
        message = f"{request.method} {request.url.path}: {error.detail}"
    return error_response(error.status_code, code, message, error.headers)


async def _internal(request: Request, error: Exception) -> JSONResponse:
    return error_response(500, "internal", "the server failed at this request; its log says why")
