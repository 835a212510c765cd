"""A Hub on 127.0.0.1 that speaks the endpoints which huggingface_hub 2.4 asks for when models are pushed and loaded.

Repositories live in memory: files by their content, commits with a sha of their own, branches that point to commits.
As on the Hub, weights are kept in large file storage and answered by a redirect that carries their ETag and size, all
else is answered directly; `X-Repo-Commit` names the commit; errors are told apart by `X-Error-Code`.

    with Hub(tokens={"secret": "someone"}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "secret", "HF_HUB_DISABLE_XET": "1"}

Faults are asked for in advance and come true once each, see [`Hub.drop`]. What was asked is in `Hub.requests`.

Not imitated: Xet, pull requests, datasets and Spaces, rate limits. What is refused in the metadata of a model card is
what the Hub documents (types, known licences, shape of the evaluation results), not its full schema.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".onnx", ".h5")  # of the Hub's own .gitattributes
LICENCES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "other")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("GET", rf"/api/models/{NAME}(/revision/{REVISION})?", "info"),
    ("GET", rf"/api/models/{NAME}/refs", "refs"),
    ("GET", rf"/api/models/{NAME}/commits/{REVISION}", "commits"),
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}(/(?P<path>.+))?", "tree"),
    ("POST", rf"/api/models/{NAME}/branch/{REVISION}", "branch"),
    ("POST", rf"/api/models/{NAME}/preupload/{REVISION}", "preupload"),
    ("POST", rf"/api/models/{NAME}/commit/{REVISION}", "commit"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", rf"/{NAME}\.git/info/lfs/verify", "lfs_verify"),
    ("PUT", rf"/storage/{NAME}/(?P<oid>[0-9a-f]{{64}})", "lfs_put"),
    ("GET", rf"/storage/{NAME}/(?P<oid>[0-9a-f]{{64}})", "lfs_get"),
    ("GET", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
]


@dataclass(frozen=True)
class Blob:
    """Content of a file; `lfs` if it is kept in large file storage."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What git calls it: the SHA-1 of the blob. (That of the content itself also where git has a pointer.)"""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    files: dict[str, Blob]
    parent: "Commit | None" = None


@dataclass
class Repo:
    branches: dict[str, Commit]
    commits: dict[str, Commit] = field(default_factory=dict)  # by sha

    def find(self, revision: str) -> Commit | None:
        return self.branches.get(revision) or self.commits.get(revision)

    def add(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        sha = hashlib.sha1(f"{title}{len(self.commits)}{id(self)}".encode()).hexdigest()  # never the same twice
        self.branches[branch] = self.commits[sha] = commit = Commit(sha, title, files, parent)
        return commit

    def history(self, branch: str = "main") -> list[Commit]:
        """The branch's commits, the newest first."""
        commits, commit = [], self.branches[branch]
        while commit is not None:
            commits.append(commit)
            commit = commit.parent
        return commits

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Content of each file at a revision."""
        return {path: blob.content for path, blob in self.find(revision).files.items()}


@dataclass
class Fault:
    method: str
    path: re.Pattern
    after: int | None
    skip: int


class Hub:
    """
    The server, with its state where a test can see it.

    Args:
        tokens (`dict[str, str]`): name of the user of each valid token.
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.storage: dict[tuple[str, str], bytes] = {}  # of large files, by repository and SHA-256
        self.requests: list[tuple[str, str]] = []  # method and path
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def drop(self, method: str, path: str, after: int | None = None, skip: int = 0) -> None:
        """The next such request, or that after `skip` others, finds its connection closed: before its body is read, or
        with `after`, after so many bytes of the answer. `path` is a regular expression searched in the path."""
        self.faults.append(Fault(method, re.compile(path), after, skip))

    def count(self, method: str, path: str) -> int:
        """Number of such requests so far."""
        return sum(made == method and re.search(path, where) is not None for made, where in self.requests)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.path.search(path):
                    if fault.skip == 0:
                        self.faults.remove(fault)
                        return fault
                    fault.skip -= 1
        return None


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None, sha=None):
        super().__init__(message)
        self.status, self.message, self.body = status, message, body or {"error": message}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        if sha:
            self.headers["X-Repo-Commit"] = sha


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.handle_request("GET")

    def do_HEAD(self):
        self.handle_request("HEAD")

    def do_POST(self):
        self.handle_request("POST")

    def do_PUT(self):
        self.handle_request("PUT")

    def handle_request(self, method: str):
        parts = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        self.hub.requests.append((method, parts.path))
        self.fault = self.hub.take_fault(method, parts.path)
        if self.fault is not None and self.fault.after is None:
            self.close_connection = True
            return
        self.body = self.read_body()
        for wanted, pattern, name in ROUTES:
            match = re.fullmatch(pattern, parts.path)
            if match is not None and wanted == ("GET" if method == "HEAD" else method):
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                try:
                    with self.hub.lock:
                        getattr(self, name)(**groups)
                except Refusal as refusal:
                    self.answer(refusal.body, refusal.status, refusal.headers)
                return
        self.answer({"error": f"no such endpoint: {method} {parts.path}"}, 404)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: bytes | dict | list, status: int = 200, headers: dict | None = None):
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None:
            content, self.close_connection = content[: self.fault.after], True
        self.wfile.write(content)

    # Who asks, and for what ------------------------------------------------------------------------------------------

    def user(self) -> str | None:
        """Name of the user, `None` without a token. A token that is wrong is refused wherever it is sent."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def writer(self, repo: str) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if repo.partition("/")[0] != user:
            raise Refusal(403, f"You don't have the rights to write to {repo}")

    def find_repo(self, repo: str) -> Repo:
        self.user()
        if repo not in self.hub.repos:
            # As on the Hub: 401 to strangers, so that nobody learns what private repositories there are.
            raise Refusal(404 if self.user() else 401, "Repository not found", "RepoNotFound")
        return self.hub.repos[repo]

    def find_commit(self, repo: str, revision: str) -> Commit:
        commit = self.find_repo(repo).find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Endpoints -------------------------------------------------------------------------------------------------------

    def whoami(self):
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        self.answer({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self):
        errors = metadata_errors(json.loads(self.body)["content"])
        if self.headers.get("Accept") == "text/plain":  # as `RepoCard.validate` asks
            return self.answer("\n".join(errors).encode(), 400 if errors else 200)
        entries = [{"message": message} for message in errors]
        self.answer({"errors": entries, "warnings": []}, 400 if errors else 200)

    def create(self):
        request = json.loads(self.body)
        user = self.user()
        repo = f"{request.get('organization') or user}/{request['name']}"
        self.writer(repo)
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repos:
            raise Refusal(409, "You already created this model repo", body={"error": "exists", "url": url})
        self.hub.repos[repo] = Repo({})
        self.hub.repos[repo].add("main", "initial commit", {".gitattributes": Blob(b"*.safetensors lfs\n", False)})
        self.answer({"url": url, "name": repo})

    def info(self, repo: str, revision: str = "main"):
        commit = self.find_commit(repo, revision)
        card = metadata_of(commit.files["README.md"].content.decode()) if "README.md" in commit.files else {}
        self.answer(
            {
                "id": repo,
                "modelId": repo,
                "sha": commit.sha,
                "private": False,
                "tags": card.get("tags", []),
                "cardData": card,
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def refs(self, repo: str):
        branches = self.find_repo(repo).branches.items()
        entries = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.sha} for name, commit in branches]
        self.answer({"branches": entries, "tags": [], "converts": []})

    def commits(self, repo: str, revision: str):
        self.find_commit(repo, revision)
        entries = [
            {"id": commit.sha, "title": commit.title, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
            for commit in self.hub.repos[repo].history(revision)
        ]
        self.answer(entries)

    def tree(self, repo: str, revision: str, path: str = ""):
        commit = self.find_commit(repo, revision)
        prefix = f"{path}/" if path else ""
        inside = {name: blob for name, blob in sorted(commit.files.items()) if name.startswith(prefix)}
        if path and not inside:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound", sha=commit.sha)
        entries, folders = [], set()
        for name, blob in inside.items():
            parents = name.removeprefix(prefix).split("/")[:-1]
            folders |= {prefix + "/".join(parents[: depth + 1]) for depth in range(len(parents))}
            if not parents or self.query.get("recursive", "").lower() == "true":
                entry = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.oid}
                if blob.lfs:
                    entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
                entries.append(entry)
        if self.query.get("recursive", "").lower() != "true":
            folders = {name for name in folders if "/" not in name.removeprefix(prefix)}
        entries += [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
        self.answer(entries)

    def branch(self, repo: str, revision: str):
        self.writer(repo)
        found = self.find_repo(repo)
        if revision in found.branches:
            raise Refusal(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        found.branches[revision] = self.find_commit(repo, start)
        self.answer({})

    def preupload(self, repo: str, revision: str):
        self.writer(repo)
        commit = self.find_commit(repo, revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10_000_000
            known = commit.files.get(file["path"])
            oid = {"oid": known.etag} if known is not None and known.lfs == lfs else {}
            mode = "lfs" if lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        self.answer({"files": answers, "commitOid": commit.sha})

    def commit(self, repo: str, revision: str):
        self.writer(repo)
        parent = self.find_commit(repo, revision)
        files, header = dict(parent.files), {}
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                content = self.hub.storage.get((repo, value["oid"]))
                if content is None:
                    raise Refusal(400, f"{value['path']} points to content that was not uploaded")
                files[value["path"]] = Blob(content, True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
        if header.get("parentCommit") not in (None, parent.sha):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        if "README.md" in files and (errors := metadata_errors(files["README.md"].content.decode())):
            raise Refusal(400, errors[0])
        made = self.hub.repos[repo].add(revision, header["summary"], files)
        self.answer({"success": True, "commitOid": made.sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{made.sha}"})

    def lfs_batch(self, repo: str):
        self.writer(repo)
        request, objects = json.loads(self.body), []
        for wanted in request["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if (repo, wanted["oid"]) not in self.hub.storage:
                upload = {"href": f"{self.hub.url}/storage/{repo}/{wanted['oid']}"}
                verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, repo: str, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content is not what its name says")
        self.hub.storage[repo, oid] = self.body
        self.answer(b"", headers={"ETag": f'"{oid}"'})

    def lfs_verify(self, repo: str):
        self.writer(repo)
        request = json.loads(self.body)
        content = self.hub.storage.get((repo, request["oid"]))
        if content is None or len(content) != request["size"]:
            raise Refusal(422, "The object is not there, or not of that size")
        self.answer({})

    def lfs_get(self, repo: str, oid: str):
        self.answer_file(self.hub.storage[repo, oid], {"ETag": f'"{oid}"'})

    def resolve(self, repo: str, revision: str, path: str):
        commit = self.find_commit(repo, revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", sha=commit.sha)
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"'}
        if not blob.lfs:
            return self.answer_file(blob.content, headers)
        # The Hub sends to a host of its storage, another one than its own: localhost is that here.
        address = self.hub.url.replace("127.0.0.1", "localhost")
        headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": len(blob.content)}
        headers["Location"] = f"{address}/storage/{repo}/{blob.sha256}"
        self.answer(b"", 302, headers)

    def answer_file(self, content: bytes, headers: dict):
        headers = {"Accept-Ranges": "bytes", **headers}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return self.answer(content, 200, headers)
        first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        if first > last:
            raise Refusal(416, "Range Not Satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.answer(content[first : last + 1], 206, headers)


def metadata_of(card: str) -> dict:
    """The YAML block at the top of a model card; empty if there is none."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    return (yaml.safe_load(match[1]) if match else None) or {}


def metadata_errors(card: str) -> list[str]:
    """What is wrong with the metadata of a model card, in the order of its fields."""
    try:
        metadata = metadata_of(card)
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["the metadata must be a mapping"]
    errors = []
    for name in ("tags", "datasets", "metrics", "language"):
        values = metadata.get(name, [])
        if not isinstance(values, list | str) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{name}" must be a string or an array of strings')
    if metadata.get("license", "mit") not in LICENCES:
        errors.append(f'"license" must be one of {list(LICENCES)}')
    languages = metadata.get("language") or []
    for language in [languages] if isinstance(languages, str) else languages:
        if not re.fullmatch(r"[a-z]{2,3}", str(language)):
            errors.append(f'"language" must only contain codes of ISO 639, got {language!r}')
    datasets = metadata.get("datasets") or []
    for name in [datasets] if isinstance(datasets, str) else datasets:
        if not DATASET_ID.fullmatch(str(name)):
            errors.append(f'"datasets" must be names on the Hub, got {name!r}')
    for name in ("pipeline_tag", "library_name"):
        if not isinstance(metadata.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    for model in metadata.get("model-index") or []:
        if not isinstance(model.get("name"), str):
            errors.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            for part, needed in (("task", ("type",)), ("dataset", ("type", "name"))):
                for key in needed:
                    if not isinstance(result.get(part, {}).get(key), str):
                        errors.append(f'"model-index[0].results[0].{part}.{key}" is required')
            for metric in result.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                    errors.append('"model-index[0].results[0].metrics[0]" needs type and value')
    return errors
