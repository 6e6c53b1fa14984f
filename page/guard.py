"""Who may talk to the page: a browser on this machine that was given the key, and nobody else.

A server on the loopback address is reached by every page that the browser shows. A foreign page may send requests to
it (their answers stay hidden) or have its own name point to 127.0.0.1 (DNS rebinding), which makes it one of our pages.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import AsyncIterator, Iterable
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from page.texts import say

ADDRESS = "127.0.0.1"  # there is no flag to change it
PHOTO_BYTES = 40 * 2**20
JSON_BYTES = 64 * 2**10
CSP = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Stands before the whole application, error pages included; plain ASGI, so that uploads are not buffered.

    Args:
        app: what is guarded.
        port: that the server listens on.
        key: the secret in the address that the terminal shows.
    """

    def __init__(self, app: ASGIApp, port: int, key: str) -> None:
        self.app, self.key = app, key
        self.hosts = (f"{ADDRESS}:{port}", f"localhost:{port}")
        self.cookie = f"antidreambooth-{port}"  # cookies do not tell ports apart

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers by itself what is refused."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":  # there are none
            await send({"type": "websocket.close", "code": 1008})
        else:
            answer = self.refusal(scope)
            await (answer or self.app)(scope, receive, with_headers(send))

    def refusal(self, scope: Scope) -> Response | None:
        """What is answered instead of the application; None where it may answer."""
        headers, method = Headers(scope=scope), scope["method"]
        host = headers.get("host", "")
        if host not in self.hosts:
            return refused(421, "wrong_host")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return refused(403, "foreign_page")
        origin = headers.get("origin")
        if origin != f"http://{host}" and (origin is not None or method not in ("GET", "HEAD")):
            return refused(403, "foreign_page")
        if method == "GET" and scope["path"] == "/":
            for token in parse_qs(scope["query_string"].decode("latin-1")).get("token", []):
                if self.is_key(token):
                    return self.welcome()
        if not self.is_key(cookie_of(headers, self.cookie)):
            return refused(401, "no_key")
        return None

    def is_key(self, given: str) -> bool:
        """Compares in constant time."""
        return hmac.compare_digest(given.encode(), self.key.encode())

    def welcome(self) -> Response:
        """Puts the key into a cookie and out of the address, where the history would keep it."""
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(self.cookie, self.key, httponly=True, samesite="strict", path="/")
        return answer


def refused(status: int, reason: str) -> Response:
    """A refusal in a sentence."""
    return PlainTextResponse(say(reason), status_code=status)


def with_headers(send: Send) -> Send:
    """Adds what every answer carries; an application's own of the same name is replaced."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name, value) for name, value in message.get("headers", ()) if name.decode().lower() not in HEADERS]
            ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*own, *ours]}
        await send(message)

    return sending


def cookie_of(headers: Headers, name: str) -> str:
    """A cookie's value, or nothing."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


async def sized(request: Request, most: int) -> AsyncIterator[bytes]:
    """A request's body piece by piece; what is said of its size is believed only where it is too much.

    Raises:
        HTTPException: 413 as soon as it is too large.
    """
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > most:
        raise HTTPException(413, say("too_large", most=most // 2**20))
    came = 0
    async for piece in request.stream():
        came += len(piece)
        if came > most:
            raise HTTPException(413, say("too_large", most=most // 2**20))
        yield piece


def read_key(home: Path) -> str:
    """The key of this user's page, made anew where there is none: a restart does not throw open tabs out.

    Args:
        home: the page's folder, which only this user may enter.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    home.chmod(0o700)
    file = home / "key"
    if file.is_file() and len(key := file.read_text(encoding="ascii").strip()) >= 43:
        file.chmod(0o600)
        return key
    file.unlink(missing_ok=True)
    file.touch(mode=0o600)
    key = secrets.token_urlsafe(32)
    file.write_text(key, encoding="ascii")
    return key


def one_of(value: object, allowed: Iterable[str]) -> str:
    """A word out of a list.

    Raises:
        HTTPException: 400, it is none of them.
    """
    if not isinstance(value, str) or value not in tuple(allowed):
        raise HTTPException(400, say("not_understood"))
    return value
