"""A server that W&B logs in to, uploads to, and waits for: answers so many requests, then stalls, refuses or dies."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["stall", "refuse", "die"]


class Server:
    """On a free port of this machine; use as a context.

    Attributes:
        url: for WANDB_BASE_URL.
        rows: run -> what was uploaded of its history.
        requests: how many arrived.
    """

    def __init__(self, answers: int | None = None, then: Fault = "stall") -> None:
        self._left, self._then = answers, then
        self._lock, self._over = threading.Lock(), threading.Event()
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.requests = 0
        self._http = _Http(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._http.shutdown()
        self._http.server_close()

    def status(self) -> int | None:
        """What to answer with now; None: nothing, and the connection goes. Does not return while the server stalls."""
        with self._lock:
            self.requests += 1
            if self._left is None or self._left > 0:
                self._left = None if self._left is None else self._left - 1
                return 200
        if self._then == "stall":
            self._over.wait()
        if self._then == "die":
            self._http.socket.close()
        return 401 if self._then == "refuse" else None

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """What W&B's server would say, as far as its client looks."""
        if path == "/graphql":
            asked = json.loads(body)
            return {"data": self._data(asked["query"], asked.get("variables") or {})}
        if path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            with self._lock:
                self.rows.setdefault(path.split("/")[-2], []).extend(map(json.loads, history.get("content", [])))
        return {}

    def _data(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "somebody"}}
        if "query Viewer" in query:
            return {"viewer": {"id": "u", "entity": "somebody", "username": "somebody", "flags": "{}"}}
        if "RunResumeStatus" in query:
            return {"model": {**project, "bucket": None}}
        if "UpsertBucket" in query:
            run = {"id": "b", "name": given["name"], "displayName": given["displayName"], "config": "{}"}
            return {"upsertBucket": {"bucket": {**run, "project": project, "historyLineCount": 0}, "inserted": True}}
        if "query ArtifactType" in query:
            return {"project": {"artifact": None}}
        if "mutation CreateArtifact " in query:  # of a table; it is there, and nothing is to be uploaded
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "a"}}}
            return {"createArtifact": {"artifact": artifact}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that was killed is what is tested; what the server does wrong fails the test by what is missing."""


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status = server.status()
            if status is None:
                self.close_connection = True
                return
            content = json.dumps(server.answer(self.path, body) if status == 200 else {"errors": []}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    return Handler
