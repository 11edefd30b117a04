"""Errors of the server, all as one JSON object: {"error": {"code", "message", "status"}}; the web framework's, too."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hyperclip_fast.serving.errors import RequestError


def error_response(error: RequestError) -> JSONResponse:
    """An error as JSON."""
    return JSONResponse({"error": error.content}, error.status, headers=error.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Every error of an app becomes JSON."""
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal)


async def _request_error(request: Request, error: Any) -> JSONResponse:
    return error_response(error)


async def _http_error(request: Request, error: Any) -> JSONResponse:
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    message = error.detail
    if error.status_code in (404, 405):
        message = f"{request.method} {request.url.path}: {error.detail}"
    return error_response(RequestError(error.status_code, code, message, error.headers))


async def _internal(request: Request, error: Exception) -> JSONResponse:
    return error_response(RequestError(500, "internal", "the server failed at this request; its log says why"))
