"""A server on this machine that answers as the Hugging Face hub does when a model's files are read."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token_of_the_owner"


@dataclass
class Hub:
    """Commits of repositories, branches by name, and what was asked for.

    repos: repository -> branch or commit -> the commit and its files.
    private: repositories that only the owner's token reads.
    """

    url: str = ""
    repos: dict[str, dict[str, tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Adds a commit to a branch and gives its hash."""
        revisions = self.repos.setdefault(repo, {})
        sha = hashlib.sha1(f"{repo}{len(revisions)}".encode() + b"".join(files.values())).hexdigest()
        revisions[sha] = revisions[branch] = (sha, files)
        return sha


@contextmanager
def hub_server() -> Iterator[Hub]:
    """The server, on a free port of 127.0.0.1."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(f"{self.command} {path}")
            parts = [unquote(part) for part in path.strip("/").split("/")]
            api = parts[:2] == ["api", "models"]
            repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
            closed = repo in hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
            if repo not in hub.repos or closed:
                return self.answer(401 if closed else 404, X_Error_Code="RepoNotFound")
            revision = rest[1] if len(rest) > 1 else "main"
            if revision not in hub.repos[repo]:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            sha, files = hub.repos[repo][revision]
            if api:
                body = {"id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]}
                return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
            name = "/".join(rest[2:])
            if name not in files:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            etag = hashlib.sha1(files[name]).hexdigest()
            return self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=sha)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
