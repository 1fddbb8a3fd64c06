"""The Hugging Face hub on loopback, as far as streaming needs it: one dataset, its listings and its files."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.unit.hub_models import COMMIT

OBJECT = "0" * 40


@contextmanager
def hub(name: str, folder: Path, asked: list[tuple[str, str]]) -> Iterator[str]:
    """Serves the files in `folder` as the dataset `name`, and yields the address.

    Each file that is read is noted in `asked`, with the range that was wanted.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

    def entry(path: str) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": files[path].stat().st_size, "oid": OBJECT}

    def listing(under: str, recursive: bool) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for path in files:
            inner = path.removeprefix(f"{under}/") if under else path
            if under and inner == path:
                continue
            parts = inner.split("/")
            for depth in range(1, len(parts) + 1) if recursive else (1,):
                place = "/".join(filter(None, [under, *parts[:depth]]))
                folder = {"type": "directory", "path": place, "size": 0, "oid": OBJECT}
                found[place] = entry(path) if place == path else folder
        return list(found.values())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if found := re.fullmatch(rf"/datasets/{name}/resolve/[^/]+/(.*)", path):
                self.send_file(found[1])
            elif re.fullmatch(rf"/api/datasets/{name}(/revision/[^/]+)?", path):
                siblings = [{"rfilename": each} for each in files]
                self.send_json({"id": name, "sha": COMMIT, "siblings": siblings})
            elif found := re.fullmatch(rf"/api/datasets/{name}/tree/[^/]+/?(.*)", path):
                self.send_json(listing(found[1], "recursive=true" in self.path.lower()))
            else:
                self.send_json({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            wanted = parse_qs(body).get("paths") or (json.loads(body).get("paths") if body[:1] == "{" else [])
            self.send_json([entry(each) for each in wanted or [] if each in files])

        def send_file(self, path: str) -> None:
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{OBJECT}"', "Accept-Ranges": "bytes"}
            if path not in files:
                return self.send_json({"error": "none"}, 404, headers | {"X-Error-Code": "EntryNotFound"})
            content, status = files[path].read_bytes(), 200
            wanted = self.headers.get("Range", "")
            if found := re.fullmatch(r"bytes=(\d+)-(\d*)", wanted):
                first, last = int(found[1]), min(int(found[2] or 2**40), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[first : last + 1], 206
            if self.command == "GET":
                asked.append((path, wanted))
            return self.send(content, status, headers)

        def send_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
            kind = {"Content-Type": "application/json"}
            self.send(json.dumps(value).encode(), status, kind | dict(headers or {}))

        def send(self, content: bytes, status: int, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
