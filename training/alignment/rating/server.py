"""The web page's server: a WSGI application that serves the pairs of one session and takes votes.

Whoever knows the address may vote: its path begins with a random token, so other users of the machine and other sites
in the rater's browser cannot. Beside that, a request must name this machine (against DNS rebinding), and one that
changes something must come from the page itself.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import math
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from werkzeug.exceptions import BadRequest, Conflict, Forbidden, HTTPException, NotFound
from werkzeug.routing import Map, Rule
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response

from megatron_video.errors import UserError
from training.alignment.rating.session import OutOfTurnError, Session

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

PAGE = Path(__file__).parent / "page"
# file of the page -> its type; nothing else of the folder is served
_PAGE_FILES = {
    "page.html": "text/html; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_VIDEO_TYPES = {".mp4": "video/mp4", ".png": "image/png"}
_CHOICES = ("left", "right", "tie", "skip")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_MOST_BYTES_OF_A_VOTE = 4096


class NotSavedError(HTTPException):
    """The vote could not be written; the rater may mend that and vote again."""

    code = 507


class RatingServer:
    """The application.

    Args:
        session: whose questions are asked.
        token: first part of every path.
        host: the address it is bound to.
    """

    def __init__(self, session: Session, token: str, host: str) -> None:
        self._session, self._token, self._host = session, token, host
        self._routes = Map(
            [
                Rule("/<token>/", methods=["GET"], endpoint=lambda request: self._page_file("page.html", request)),
                Rule("/<token>/state", methods=["GET"], endpoint=lambda request: self._state()),
                Rule("/<token>/vote", methods=["POST"], endpoint=self._vote),
                Rule("/<token>/undo", methods=["POST"], endpoint=self._undo),
                Rule(
                    "/<token>/video/<int:number>/<any(left,right):side>",
                    methods=["GET"],
                    endpoint=lambda request, number, side: self._video(number, side, request),
                ),
                Rule("/<token>/<name>", methods=["GET"], endpoint=lambda request, name: self._page_file(name, request)),
            ]
        )

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """WSGI."""
        request = Request(environ)
        request.max_content_length = _MOST_BYTES_OF_A_VOTE
        try:
            self._check_host(request)
            answer: Response = self._answer(request)
        except HTTPException as error:
            # An answer that a redirect or a refused method brings along has its own headers.
            answer = error.get_response(environ)
            if not 300 <= answer.status_code < 400:
                answer = Response(f"{error.description}\n", error.code, mimetype="text/plain")
        answer.headers.update(_HEADERS)
        return answer(environ, start_response)

    def _answer(self, request: Request) -> Response:
        endpoint, found = self._routes.bind_to_environ(request.environ).match()
        values = dict(found)
        if not hmac.compare_digest(str(values.pop("token")).encode(), self._token.encode()):
            raise NotFound("open the address that `megatron-video dpo rate` printed when it was last started")
        if request.method == "POST":
            _check_origin(request)
        handler: Callable[..., Response] = endpoint
        return handler(request, **values)

    def _check_host(self, request: Request) -> None:
        if not may_be_called(request.host.rsplit(":", 1)[0].strip("[]"), self._host):
            raise Forbidden(f"this server is not called {request.host}")

    def _state(self) -> Response:
        response = Response(json.dumps(self._session.state(), ensure_ascii=False), mimetype="application/json")
        response.headers["Cache-Control"] = "no-store"
        return response

    def _vote(self, request: Request) -> Response:
        said = _body(request)
        number, choice, seconds = said.get("number"), said.get("choice"), _duration(said.get("seconds"))
        if type(number) is not int or choice not in _CHOICES or seconds is None:
            raise BadRequest(f"no vote: {said}")
        return self._changed(lambda: self._session.vote(number, choice, seconds))

    def _undo(self, request: Request) -> Response:
        number = _body(request).get("number")
        if type(number) is not int:
            raise BadRequest("undo needs the number of the question")
        return self._changed(lambda: self._session.undo(number))

    def _changed(self, change: Callable[[], None]) -> Response:
        try:
            change()
        except OutOfTurnError as error:
            raise Conflict(str(error)) from None
        except OSError as error:
            raise NotSavedError(f"Not saved: {error.strerror}. Mend that, then vote again.") from None
        return self._state()

    def _video(self, number: int, side: str, request: Request) -> Response:
        try:
            file = self._session.video(number, side).sample.file
            response = send_file(file, request.environ, _VIDEO_TYPES[file.suffix], conditional=True, etag=False)
        except (IndexError, FileNotFoundError):
            raise NotFound("there is no such video any more") from None
        # Its name is the rater's to guess from otherwise.
        response.headers.pop("Content-Disposition", None)
        response.headers["Cache-Control"] = "private, max-age=3600"
        return response

    def _page_file(self, name: str, request: Request) -> Response:
        if name not in _PAGE_FILES:
            raise NotFound("there is no such page")
        return send_file(PAGE / name, request.environ, _PAGE_FILES[name], conditional=True)


def may_be_called(name: str, bound_to: str) -> bool:
    """Whether a browser that looks for `name` may be meant for this server.

    DNS rebinding makes a foreign name point here, so a literal address is as good as the address that is bound.
    """
    if name.lower() in ("localhost", bound_to.lower()):
        return True
    local = _is_loopback(bound_to)
    try:
        return ipaddress.ip_address(name).is_loopback or not local
    except ValueError:
        return not local and name.lower() in (socket.gethostname().lower(), socket.getfqdn().lower())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _check_origin(request: Request) -> None:
    if request.headers.get("Origin") != request.host_url.rstrip("/"):
        raise Forbidden("votes are taken from the page alone")


def _body(request: Request) -> dict[str, Any]:
    said = request.get_json()
    if not isinstance(said, dict):
        raise BadRequest("not an object of JSON")
    return said


def _duration(seconds: object) -> float | None:
    # JSON's true is an int to Python.
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
        return None
    return round(float(seconds), 2)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on host and port; 0 is any free port.

    Raises:
        UserError: the port is taken, or the host is not this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error.strerror}; --port 0 takes any free one, --host 127.0.0.1 this machine"
        ) from None
    return found
