"""A stand-in of the Hugging Face Hub on the loopback, for the real clients.

It keeps repositories, commits, branches and tags in memory and answers what huggingface_hub, timm,
transformers and datasets ask for, with the Hub's status codes and headers. Every file is a regular
git blob: LFS and Xet are never used, which is why ``Dataset.push_to_hub`` does not work here (it
deletes its files too early); `Hub.commit` puts files in place without a client. Faults are switched
on by `Hub.fail` and `Hub.cut`.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import HfApi, constants, file_download, hf_api
from huggingface_hub.utils import _http as http_utils

TOKEN = "hf_token_of_the_owner"
READ_TOKEN = "hf_token_of_a_stranger"
_KINDS = {"models": "model", "datasets": "dataset"}
_DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Commit:
    """One state of a repository."""

    files: Mapping[str, bytes]
    title: str
    parent: str | None = None

    @property
    def sha(self) -> str:
        """Forty digits that depend on the contents, the title and the history."""
        digest = hashlib.sha1(f"{self.parent} {self.title}".encode())
        for path, data in sorted(self.files.items()):
            digest.update(f"{path} {blob_id(data)}".encode())
        return digest.hexdigest()


@dataclass
class Repository:
    """Commits, and the branches and tags that point to them."""

    id: str
    kind: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or (the beginning of) a hash names."""
        named = self.branches | self.tags
        if revision in named:
            return named[revision]
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        return found[0] if found else None

    def add(self, branch: str, files: Mapping[str, bytes], title: str) -> str:
        """Put a commit with exactly these files on top of a branch."""
        commit = Commit(dict(files), title, self.branches.get(branch))
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit.sha


@dataclass
class _Fault:
    on: re.Pattern[str]
    kind: str  # "status", "cut" or "lost"
    status: int
    left: int


class Hub:
    """The server, seen from a test.

    Attributes:
        url: Where it listens.
        requests: ``"METHOD /path"`` of every request so far.
        repositories: By kind and id, such as ``("model", "org/name")``.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.faults: list[_Fault] = []
        self._lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    # --------------------------------------------------------------------------- what a test does

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | str | Path,
        *,
        kind: str = "model",
        branch: str = "main",
        private: bool = False,
        title: str = "Upload",
    ) -> str:
        """Put files, or those of a folder, beside the ones that are there. Returns the commit."""
        if not isinstance(files, Mapping):
            root = Path(files)
            paths = [path for path in root.rglob("*") if path.is_file()]
            files = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
        with self._lock:
            repository = self.create(repo_id, kind=kind, private=private)
            head = repository.branches.get(branch, repository.branches["main"])
            return repository.add(branch, {**repository.commits[head].files, **files}, title)

    def create(self, repo_id: str, *, kind: str = "model", private: bool = False) -> Repository:
        """The repository; a new one begins with one commit, as on the Hub."""
        with self._lock:
            if (kind, repo_id) not in self.repositories:
                repository = Repository(repo_id, kind, private)
                repository.add("main", {".gitattributes": b""}, "initial commit")
                self.repositories[kind, repo_id] = repository
            return self.repositories[kind, repo_id]

    def files(
        self, repo_id: str, revision: str = "main", *, kind: str = "model"
    ) -> dict[str, bytes]:
        """The files of a revision, without the ``.gitattributes`` that every repository has."""
        repository = self.repositories[kind, repo_id]
        found = dict(repository.commits[repository.resolve(revision) or revision].files)
        found.pop(".gitattributes", None)
        return found

    def history(self, repo_id: str, branch: str = "main", *, kind: str = "model") -> list[str]:
        """Titles of the commits of a branch, the newest first."""
        repository, titles = self.repositories[kind, repo_id], []
        sha: str | None = repository.branches[branch]
        while sha is not None:
            titles.append(repository.commits[sha].title)
            sha = repository.commits[sha].parent
        return titles

    def fail(self, on: str, *, times: int = 1, status: int = 503) -> None:
        """Answer the next requests that match with an error; ``on`` is looked for in each.

        ``on`` is a regular expression over ``"METHOD /path"``, such as ``"POST .*/commit/"``.
        """
        self.faults.append(_Fault(re.compile(on), "status", status, times))

    def cut(self, on: str, *, times: int = 1, after: bool = False) -> None:
        """Break the connection of the next requests that match, half-way through.

        An upload is cut before anything happens; with ``after``, when all has happened and only the
        answer is lost. A download stops in the middle of the file.
        """
        self.faults.append(_Fault(re.compile(on), "lost" if after else "cut", 0, times))

    @contextlib.contextmanager
    def offline(self) -> Iterator[None]:
        """What ``HF_HUB_OFFLINE=1`` does: the clients do not even try."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            if "datasets" in sys.modules:
                patch.setattr(sys.modules["datasets"].config, "HF_HUB_OFFLINE", True)
            yield

    def environment(self, *, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """The environment for a client in a process of its own."""
        inherited = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        return {
            **inherited,
            "HF_ENDPOINT": self.url,
            "HF_HOME": constants.HF_HOME,
            "HF_HUB_OFFLINE": "1" if offline else "0",
            **({"HF_TOKEN": token} if token else {}),
        }

    def close(self) -> None:
        """Stop listening; from now on the Hub is unreachable."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        huggingface_hub.close_session()

    # --------------------------------------------------------------------- what the handler needs

    def take_fault(self, request: str) -> _Fault | None:
        """The fault that this request meets, counted down."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.left > 0 and fault.on.search(request):
                    fault.left -= 1
                    return fault
        return None

    def locked(self) -> threading.RLock:
        """Requests are answered one after the other."""
        return self._lock


class _Problem(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    fault: _Fault | None

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    # -------------------------------------------------------------------------------- the wire

    def _answer(self) -> None:
        self.fault = self.hub.take_fault(f"{self.command} {urlsplit(self.path).path}")
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault and self.fault.kind == "cut" and self.command != "GET":
            self.rfile.read(length // 2)
            self._hang_up()
            return
        body = self.rfile.read(length)
        try:
            if self.fault and self.fault.kind == "status":
                raise _Problem(self.fault.status, "the stand-in was told to fail")
            with self.hub.locked():
                answer = self._route(body)
        except _Problem as problem:
            headers = {"X-Error-Message": str(problem)}
            if problem.code:
                headers["X-Error-Code"] = problem.code
            self._send(problem.status, json.dumps(problem.body).encode(), headers)
            return
        if self.fault and self.fault.kind == "lost":
            self._hang_up()
        elif isinstance(answer, bytes):
            self._send_file(answer)
        else:
            headers = {"Content-Type": "application/json"}
            self._send(200, json.dumps(answer).encode(), headers)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()
        self.wfile = open(os.devnull, "wb")  # noqa: SIM115  (the base class closes it)

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            cut = self.fault is not None and self.fault.kind == "cut"
            self.wfile.write(data[: len(data) // 2] if cut else data)

    def _send_file(self, data: bytes) -> None:
        headers = {
            "ETag": f'"{blob_id(data)}"',
            "X-Repo-Commit": self.sha,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            self._send(200, data, headers)
            return
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
        self._send(206, data[start : stop + 1], headers)

    # ------------------------------------------------------------------------------- the routes

    def _route(self, body: bytes) -> Any:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] != "api":
            kind = "dataset" if parts[0] == "datasets" else "model"
            return self._file(kind, parts[1:] if kind == "dataset" else parts)
        if parts[1:] == ["whoami-v2"]:
            return {"type": "user", "name": self._user(), "orgs": [], "auth": {}}
        if parts[1:] == ["validate-yaml"]:
            return _validated(json.loads(body)["content"])
        if parts[1:] == ["repos", "create"]:
            return self._create(json.loads(body))
        if len(parts) >= 4 and parts[1] in _KINDS:
            return self._about(_KINDS[parts[1]], "/".join(parts[2:4]), parts[4:], body)
        raise _Problem(404, f"the stand-in does not know {self.command} {url.path}")

    def _user(self) -> str | None:
        """Who asks; an unknown token is refused."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READ_TOKEN):
            raise _Problem(401, "Invalid credentials in Authorization header")
        return {TOKEN: "org", READ_TOKEN: "stranger"}.get(token)

    def _may_write(self, owner: str) -> None:
        user = self._user()
        if user is None:
            raise _Problem(401, "Invalid username or password.")
        if user != owner:
            raise _Problem(403, f"You don't have the rights to write to the namespace {owner!r}")

    def _create(self, wanted: Mapping[str, Any]) -> Any:
        owner = wanted.get("organization") or self._user()
        self._may_write(str(owner))
        kind, repo_id = wanted.get("type", "model"), f"{owner}/{wanted['name']}"
        link = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        if (kind, repo_id) in self.hub.repositories:
            raise _Problem(409, "You already created this model repo", url=link, name=repo_id)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.create(repo_id, kind=kind, private=private)
        return {"url": link, "name": repo_id, "id": repo_id}

    def _repository(self, kind: str, repo_id: str) -> Repository:
        """What the asker may read. Without a token, missing and private look alike: 401.

        The Hub sends that 401 without a code, and clients know it by its https address; here it has
        to be said.
        """
        user, found = self._user(), self.hub.repositories.get((kind, repo_id))
        if found and not (found.private and user != repo_id.partition("/")[0]):
            return found
        if user is None:
            raise _Problem(401, "Invalid username or password.", "RepoNotFound")
        raise _Problem(404, "Repository not found", "RepoNotFound")

    def _commit(self, repository: Repository, revision: str) -> Commit:
        found = repository.resolve(revision)
        if found is None:
            raise _Problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        self.sha = found
        return repository.commits[found]

    def _file(self, kind: str, parts: list[str]) -> bytes:
        if len(parts) < 5 or parts[2] not in ("resolve", "raw"):
            raise _Problem(404, "Sorry, we can't find the page you are looking for.")
        repository = self._repository(kind, "/".join(parts[:2]))
        commit, path = self._commit(repository, parts[3]), "/".join(parts[4:])
        if path not in commit.files:
            raise _Problem(404, "Entry not found", "EntryNotFound")
        return commit.files[path]

    def _about(self, kind: str, repo_id: str, rest: list[str], body: bytes) -> Any:
        repository = self._repository(kind, repo_id)
        verb, revision = (rest[0] if rest else "revision"), (rest[1] if rest[1:] else "main")
        if verb in ("preupload", "commit", "branch", "tag") or self.command == "DELETE":
            self._may_write(repo_id.partition("/")[0])
        if verb == "revision":
            return self._info(repository, revision)
        if verb == "refs":
            return _refs(repository)
        if verb == "branch":
            start = json.loads(body or b"{}").get("startingPoint") or "main"
            self._commit(repository, start)
            return _point(repository.branches, revision, self)
        if verb == "tag":
            self._commit(repository, revision)
            return _point(repository.tags, json.loads(body)["tag"], self)
        if verb == "commit":
            return self._add(repository, revision, body)
        commit = self._commit(repository, revision)
        if verb == "tree":
            folder = "".join(f"{part}/" for part in rest[2:])
            recursive = self.query.get("recursive", "").lower() == "true"
            return _tree(commit, folder, recursive=recursive)
        if verb == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            everything = _tree(commit, "", recursive=True)
            return [entry for entry in everything if entry["path"] in wanted]
        if verb == "preupload":
            files = json.loads(body)["files"]
            facts = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": file["path"], **facts} for file in files]}
        raise _Problem(404, f"the stand-in does not know {verb}")

    def _info(self, repository: Repository, revision: str) -> Any:
        commit = self._commit(repository, revision)
        card = _card(commit.files.get("README.md", b"").decode())
        answer: dict[str, Any] = {
            "_id": "0",
            "id": repository.id,
            "modelId": repository.id,
            "author": repository.id.partition("/")[0],
            "sha": self.sha,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "createdAt": _DATE,
            "lastModified": _DATE,
            "tags": card.get("tags", []),
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }
        if card:
            answer["cardData"] = card
        for key in ("library_name", "pipeline_tag", "model-index"):
            if key in card:
                answer[key] = card[key]
        return answer

    def _add(self, repository: Repository, branch: str, body: bytes) -> Any:
        """One commit: all of its operations or none."""
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if branch not in repository.branches:
            raise _Problem(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = repository.branches[branch]
        if header.get("parentCommit") not in (None, head):
            raise _Problem(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[head].files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: data for path, data in files.items() if not path.startswith(folder)}
        sha = repository.add(branch, files, header["summary"])
        link = f"{self.hub.url}/{repository.id}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": link, "hookOutput": ""}


def blob_id(data: bytes) -> str:
    """What git calls these contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _point(names: dict[str, str], name: str, handler: _Handler) -> Any:
    if handler.command == "DELETE":
        names.pop(name, None)
    elif name in names:
        raise _Problem(409, f"Reference {name} exists already")
    else:
        names[name] = handler.sha
    return {}


def _refs(repository: Repository) -> Any:
    def entries(names: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": f"refs/{prefix}/{name}", "targetCommit": sha}
            for name, sha in names.items()
        ]

    return {
        "branches": entries(repository.branches, "heads"),
        "tags": entries(repository.tags, "tags"),
        "converts": [],
    }


def _tree(commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders below ``folder`` (with a slash at its end), as the Hub lists them."""
    if folder and not any(path.startswith(folder) for path in commit.files):
        raise _Problem(404, f"{folder} does not exist", "EntryNotFound")
    files, folders = [], set()
    for path, data in sorted(commit.files.items()):
        if not path.startswith(folder):
            continue
        inner = path[len(folder) :].split("/")[:-1]
        depth = len(inner) if recursive else min(len(inner), 1)
        folders |= {folder + "/".join(inner[: n + 1]) for n in range(depth)}
        if recursive or not inner:
            entry = {"type": "file", "path": path, "oid": blob_id(data), "size": len(data)}
            files.append(entry)
    return files + [
        {"type": "directory", "path": path, "oid": blob_id(path.encode()), "size": 0}
        for path in sorted(folders)
    ]


def _card(text: str) -> dict[str, Any]:
    """The front matter of a README.md."""
    found = re.match(r"---\n(.*?)\n---(\n|$)", text, re.DOTALL)
    data = yaml.safe_load(found[1]) if found else None
    return data if isinstance(data, dict) else {}


def _validated(text: str) -> Any:
    """What the Hub finds wrong with a card's front matter, as far as it is known here."""
    try:
        card = _card(text)
    except yaml.YAMLError as error:
        raise _Problem(400, "Invalid YAML", errors=[{"message": str(error)}], warnings=[]) from None
    if card:
        return {"errors": [], "warnings": []}
    return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}


# ------------------------------------------------------------------------------------- fixtures


@contextlib.contextmanager
def running_hub(home: Path) -> Iterator[Hub]:
    """A Hub that the clients in this process talk to, with their cache in ``home``."""
    server = Hub()
    default = hf_api.api.endpoint

    # Libraries keep clients that they made at import, some of them inside a block like this one.
    def get(api: HfApi) -> str:
        stored: str = vars(api)["endpoint"]
        return server.url if stored == default else stored

    def keep(api: HfApi, endpoint: str) -> None:
        vars(api)["endpoint"] = default if endpoint == server.url else endpoint

    # The clients wait between attempts; here nothing gets better by waiting.
    impatient = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }
    if hasattr(constants, "HF_URL_HOSTS"):  # not before huggingface_hub 2
        settings["HF_URL_HOSTS"] = constants.HF_URL_HOSTS | {"127.0.0.1"}
    huggingface_hub.close_session()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr(HfApi, "endpoint", property(get, keep), raising=False)
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        for module in (http_utils, file_download):
            patch.setattr(module, "time", impatient)
        if "datasets" in sys.modules:
            config = sys.modules["datasets"].config
            patch.setattr(config, "HF_ENDPOINT", server.url)
            patch.setattr(config, "HF_HUB_OFFLINE", False)
            patch.setattr(config, "HF_DATASETS_CACHE", home / "datasets")
        try:
            yield server
        finally:
            server.close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub that the clients in this process talk to, with an empty cache and nobody logged in.

    Log in by the fixture `logged_in`, or pass ``token=TOKEN`` to a client. Import datasets at the
    top of a test file that needs it: it reads its settings once, at import.
    """
    with running_hub(tmp_path / "huggingface") as server:
        yield server


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """The owner of everything below ``org/`` is logged in."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return TOKEN
