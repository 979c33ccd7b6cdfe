"""A model hub of two endpoints, enough for huggingface_hub to list and download."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Repos = dict[str, dict[str, bytes]]


@contextmanager
def fake_hub(repos: Repos) -> Iterator[str]:
    """Serves these repositories (name to file name to content); gives the address.

    A repository whose name starts with ``gated/`` refuses every download, and one with ``broken/``
    hangs up before the first byte of every file. One with ``slow/`` takes 3 s to say what it has.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repos))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(repos: Repos) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

        def _answer(self, *, body: bool) -> None:
            path = urlsplit(self.path).path.strip("/")
            for name, files in repos.items():
                if path.startswith(f"api/models/{name}/tree/"):
                    rows = [
                        {"type": "file", "path": file, "size": len(data), "oid": oid(data)}
                        for file, data in files.items()
                    ]
                    return self._send(200, json.dumps(rows).encode(), body=body)
                if path.startswith(f"api/models/{name}"):
                    time.sleep(3 if name.startswith("slow/") else 0)
                    info = {
                        "id": name,
                        "sha": COMMIT,
                        "siblings": [{"rfilename": f} for f in files],
                    }
                    return self._send(200, json.dumps(info).encode(), body=body)
                _, found, rest = path.partition(f"{name}/resolve/")
                file = rest.partition("/")[2]
                if found and name.startswith("gated/"):
                    return self._send(403, b"", body=body, code="GatedRepo")
                if found and file in files:
                    data, sent = files[file], 0 if name.startswith("broken/") else None
                    return self._send(200, data, body=body, sent=sent)
                if found:
                    return self._send(404, b"", body=body, code="EntryNotFound")
            return self._send(404, b"", body=body, code="RepoNotFound")

        def _send(
            self, status: int, data: bytes, *, body: bool, code: str = "", sent: int | None = None
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{oid(data)}"')
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            if body:
                self.wfile.write(data[:sent])
                self.close_connection |= sent is not None

    return Handler


def oid(data: bytes) -> str:
    """The content's name, as the hub gives it."""
    return hashlib.sha1(data).hexdigest()
