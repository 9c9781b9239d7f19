"""Captions from an OpenAI-compatible endpoint, such as vLLM: frames as JPEG in chat completions.

Requests are paced, retried with growing waits up to a bound, and timed as a whole. The key is read from an environment
variable and goes into one header; no report, manifest, journal or message holds it.
"""

from __future__ import annotations

import base64
import email.utils
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from data_prep.caption_config import Answer, CaptionConfig, Clip, Kind, Prompt, prompt_text
from megatron_video.errors import UserError

_FIRST_WAIT_SECONDS = 0.5
_LARGEST_ANSWER_BYTES = 16 << 20
_MESSAGE_CHARACTERS = 300
# Worth another try; other 4xx are about this one request.
_PASSING_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
# Wrong for every request: key, permission, address or model name.
_FATAL_STATUS = {401: "the key is refused", 403: "no permission", 404: "no such address or model", 405: "wrong address"}


@dataclass(frozen=True)
class EndpointSettings:
    """Where and how fast to ask."""

    url: str
    """Up to and with /v1."""
    model: str
    api_key_env: str | None = None
    """Environment variable that holds the key; None sends none."""
    concurrency: int = 16
    """Requests under way at once."""
    requests_per_minute: float | None = None
    """Retries count too."""
    timeout: float = 120.0
    """Seconds for one whole request."""
    retries: int = 5
    """Further tries after the first."""
    longest_wait: float = 60.0
    """Seconds between two tries at most, also where the server asks for more."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--endpoint {self.url!r} is no http address, such as http://localhost:8000/v1")
        if parts.username or parts.password:
            raise UserError("--endpoint holds a user or password, which would be written down; use --api-key-env")
        for option, value, least in (("concurrency", self.concurrency, 1), ("retries", self.retries, 0)):
            if value < least:
                raise UserError(f"--{option} {value} must be at least {least}")
        pace = 1.0 if self.requests_per_minute is None else self.requests_per_minute
        for option, number in (
            ("timeout", self.timeout),
            ("requests-per-minute", pace),
            ("longest-wait", self.longest_wait),
        ):
            if not number > 0:
                raise UserError(f"--{option} {number:g} must be above 0")


class Pace:
    """Slots for requests, at most so many a minute; a server's wish to wait moves them all."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def wait(self) -> None:
        """Until this request's slot comes, or all is stopped."""
        with self._lock:
            slot = max(self._next, time.monotonic())
            self._next = slot + self._gap
        self.stopped.wait(max(0.0, slot - time.monotonic()))

    def hold(self, seconds: float) -> None:
        """Give no slot for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class EndpointCaptioner:
    """Asks one endpoint; `httpx.Client` is shared by all threads."""

    batch_size = 1
    looks = True

    def __init__(self, settings: EndpointSettings, config: CaptionConfig) -> None:
        self.name = f"endpoint:{settings.model}/{config.fingerprint}"
        self.concurrency = settings.concurrency
        self._settings, self._config = settings, config
        self._key = _read_key(settings.api_key_env)
        self._pace = Pace(settings.requests_per_minute)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=settings.timeout,
            limits=httpx.Limits(max_connections=settings.concurrency),
        )

    def ask(self, kind: Kind, clips: Sequence[Clip]) -> list[Answer]:
        """One request a clip."""
        return [self._ask_one(self._config.prompts[kind], clip) for clip in clips]

    def figures(self) -> dict[str, int]:
        """Requests and retries so far."""
        return {"requests": self._counts["requests"], "retries": self._counts["retries"]}

    def close(self) -> None:
        """Ends the waits of all threads too."""
        self._pace.stopped.set()
        self._client.close()

    def _ask_one(self, prompt: Prompt, clip: Clip) -> Answer:
        body = json.dumps(_request(prompt, clip, self._settings.model, self._config)).encode()
        answer = Answer()
        for attempt in range(self._settings.retries + 1):
            self._pace.wait()
            if self._pace.stopped.is_set():
                return Answer(problem="stopped", again=True)
            self._count("retries" if attempt else "requests")
            answer, wish = self._try(body)
            if not answer.again or attempt == self._settings.retries:
                break
            self._wait(attempt, wish)
        return answer

    def _wait(self, attempt: int, wish: float | None) -> None:
        longest = self._settings.longest_wait
        if wish is not None:
            # The server speaks to all threads, not to the one that happened to ask.
            self._pace.hold(min(wish, longest))
            return
        # Half of the wait is drawn, so that requests that failed together do not come back together.
        self._pace.stopped.wait(min(longest, _FIRST_WAIT_SECONDS * 2**attempt) * random.uniform(0.5, 1.0))

    def _try(self, body: bytes) -> tuple[Answer, float | None]:
        """The answer to one request, and the seconds that the server wants us to wait."""
        try:
            status, headers, content = self._post(body)
        except httpx.HTTPError as error:
            return _passing(f"{type(error).__name__}: {self._clean(str(error))}"), None
        if status == 200:
            return _read_answer(content), None
        message = self._clean(content.decode("utf-8", "replace"))
        if status in _FATAL_STATUS:
            raise UserError(f"{self._settings.url}: HTTP {status}, {_FATAL_STATUS[status]}: {message}")
        if status in _PASSING_STATUS:
            return _passing(f"HTTP {status}: {message}"), _retry_after(headers)
        return Answer(problem=f"HTTP {status}: {message}"), None

    def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        deadline = time.monotonic() + self._settings.timeout
        url = f"{self._settings.url.rstrip('/')}/chat/completions"
        with self._client.stream("POST", url, content=body, headers={"Content-Type": "application/json"}) as response:
            content = bytearray()
            for block in response.iter_bytes():
                content += block
                # httpx times single reads; a server that drips bytes would hold a thread for ever.
                if time.monotonic() > deadline or len(content) > _LARGEST_ANSWER_BYTES:
                    raise httpx.ReadTimeout(f"answer of {len(content)} bytes so far is too slow or too long")
            return response.status_code, response.headers, bytes(content)

    def _clean(self, message: str) -> str:
        # Some servers repeat the key that they refuse.
        text = message.replace(self._key, "***") if self._key else message
        return " ".join(text.split())[:_MESSAGE_CHARACTERS]

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts["requests"] += 1
            self._counts["retries"] += what == "retries"


def _read_key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"--api-key-env {variable}: this environment variable is not set")
    return key


def _request(prompt: Prompt, clip: Clip, model: str, config: CaptionConfig) -> dict[str, Any]:
    pictures = [base64.b64encode(jpeg).decode() for jpeg in clip.jpegs]
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}} for picture in pictures
    ]
    content.append({"type": "text", "text": prompt_text(prompt, clip.row)})
    messages: list[dict[str, Any]] = [{"role": "system", "content": prompt.system}] if prompt.system else []
    messages.append({"role": "user", "content": content})
    return {
        "model": model,
        "messages": messages,
        "max_tokens": prompt.max_tokens,
        "temperature": config.temperature,
    }


def _read_answer(content: bytes) -> Answer:
    try:
        choice = json.loads(content)["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        text = message.get("content") or ""
        if not isinstance(text, str):
            raise TypeError(f"content is a {type(text).__name__}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return _passing(f"not a chat completion: {type(error).__name__}: {error}")
    refusal = message.get("refusal") or ("content filter" if reason == "content_filter" else "")
    return Answer(problem=f"refused: {str(refusal)[:80]}") if refusal else Answer(text, cut=reason == "length")


def _passing(problem: str) -> Answer:
    return Answer(problem=problem, again=True)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
