"""Sharing: a folder and a local server that speaks the Hub's few calls; the card as it is read."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import export_cases as some
import pytest
import torch

from attrib_zoo import TTAME, LCAMImg
from attrib_zoo.errors import BackboneMismatchError, CheckpointError, DataError, NotFittedError, OptionError
from attrib_zoo.sharing.card import about, card
from attrib_zoo.training.resume import to_checkpoint

TOLD = {
    "model": "timm/resnet18.a1_in1k",
    "data": "4 images of noise | nothing else",
    "datasets": ["imagenet-1k"],
    "measures": {"AD(15)": 71.25, "ours": {"IC(15)": 5.5}},
    "licence": "apache-2.0",
    "notes": "Thanks to all.",
}


class Hub(ThreadingHTTPServer):
    """Repositories in memory: the commits of each, by hash, and what its branches point to."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.calls, self.tokens = {}, [], set()
        self.broken = None  # a status for every commit
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    """What huggingface_hub asks for."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def reply(self, status=200, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status, code):
        self.reply(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.calls.append(("POST", path))
        self.server.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)", path)
        repo, action, revision = match.groups()
        found = self.server.repos.get(repo)
        if found is None:
            return self.fail(404, "RepoNotFound")
        if action == "branch":
            found["branches"].setdefault(revision, found["branches"]["main"])
            return self.reply(201, {})
        if action == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self.reply(200, {"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
        if self.server.broken:
            return self.fail(self.server.broken, "Disk full")
        return self.commit(repo, found, revision, body)

    def create(self, asked):
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.server.repos:
            return self.reply(409, {"error": "exists", "url": f"{self.server.url}/{repo}"})
        empty, private = "0" * 40, asked.get("private") or asked.get("visibility") == "private"
        self.server.repos[repo] = {"commits": {empty: {}}, "branches": {"main": empty}, "private": private}
        return self.reply(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})

    def commit(self, repo, found, revision, body):
        files = dict(found["commits"][found["branches"][revision]])
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        oid = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        found["commits"][oid], found["branches"][revision] = files, oid
        url = f"{self.server.url}/{repo}/commit/{oid}"
        return self.reply(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.calls.append((self.command, self.path))
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path.partition("?")[0])
        if match is None:
            return self.fail(404, "RepoNotFound")
        repo, revision, name = match.groups()
        found = self.server.repos.get(repo)
        if found is None:
            return self.fail(401, "RepoNotFound")
        oid = found["branches"].get(revision, revision)
        if oid not in found["commits"]:
            return self.fail(404, "RevisionNotFound")
        data = found["commits"][oid].get(name)
        if data is None:
            return self.fail(404, "EntryNotFound")
        tag = hashlib.sha1(data).hexdigest()
        return self.reply(200, data, ETag=f'"{tag}"', X_Repo_Commit=oid, Accept_Ranges="none")


@pytest.fixture
def hub(monkeypatch):
    client = pytest.importorskip(
        "huggingface_hub", reason="huggingface_hub is not installed: pip install 'attrib_zoo[hub]'"
    )
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Hub()
    if tuple(map(int, client.__version__.split(".")[:3])) < (1, 3, 3):  # reads a commit's address with HF_ENDPOINT only
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in ("file_download", "constants"):  # which holds it differs
            monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def pull(hub, tmp_path, repo, model, cls=TTAME, **options):
    return cls.from_pretrained(repo, model, endpoint=hub.url, cache_dir=tmp_path / "cache", token=False, **options)


# ---------------------------------------------------------------------- there and back


def test_through_a_folder(tmp_path):
    explainer, images = some.rows(), some.images()
    folder = explainer.save_pretrained(tmp_path / "new" / "folder", **TOLD)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "explainer.safetensors"]
    again = TTAME.from_pretrained(folder, some.cnn())
    assert torch.equal(again.attribute(images), explainer.attribute(images))
    assert "Thanks to all." in (folder / "README.md").read_text("utf-8")


def test_through_a_hub(hub, tmp_path):
    explainer, images = some.rows(), some.images()
    url = explainer.push_to_hub("me/shared", endpoint=hub.url, token="hf_mine", private=True, **TOLD)
    (repo,) = hub.repos.values()
    assert repo["private"] is True
    assert "Bearer hf_mine" in hub.tokens
    assert url.startswith(f"{hub.url}/me/shared/commit/")
    commits = [path for _, path in hub.calls if "/commit/" in path]
    assert commits == ["/api/models/me/shared/commit/main"], "one commit for both files"
    files = repo["commits"][url.rpartition("/")[2]]
    assert sorted(files) == ["README.md", "explainer.safetensors"]
    assert "TTAME.from_pretrained('me/shared', model)" in files["README.md"].decode()
    again = pull(hub, tmp_path, "me/shared", some.cnn())
    assert torch.equal(again.attribute(images), explainer.attribute(images))


def test_a_revision_is_for_ever(hub, tmp_path):
    first, second = some.rows(), some.rows(smooth=5)
    oid = first.push_to_hub("me/shared", endpoint=hub.url, token="t").rpartition("/")[2]
    second.push_to_hub("me/shared", endpoint=hub.url, token="t")
    second.push_to_hub("me/shared", endpoint=hub.url, token="t", revision="wide")
    assert pull(hub, tmp_path, "me/shared", some.cnn(), revision=oid).smooth == 3
    assert pull(hub, tmp_path, "me/shared", some.cnn()).smooth == 5
    assert pull(hub, tmp_path, "me/shared", some.cnn(), revision="wide").smooth == 5
    with pytest.raises(CheckpointError, match=r"must be a branch, a tag or a commit of me/shared, got 'none'"):
        pull(hub, tmp_path, "me/shared", some.cnn(), revision="none")


# ---------------------------------------------------------------------- what is not there


def test_a_repository_without_an_explainer(hub, tmp_path):
    some.rows().push_to_hub("me/shared", endpoint=hub.url, token="t")
    repo = hub.repos["me/shared"]
    del repo["commits"][repo["branches"]["main"]]["explainer.safetensors"]
    with pytest.raises(CheckpointError, match=r"repository me/shared is no explainer .it has none at revision main."):
        pull(hub, tmp_path, "me/shared", some.cnn())


def test_a_folder_without_an_explainer(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no explainer \(it holds nothing\); save_pretrained and push_to_hub"):
        TTAME.from_pretrained(tmp_path, some.cnn())
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"is no explainer \(it holds model.safetensors\)"):
        TTAME.from_pretrained(tmp_path, some.cnn())
    with pytest.raises(OptionError, match="revision: belongs to repositories"):
        TTAME.from_pretrained(tmp_path, some.cnn(), revision="main")


def test_no_such_repository(hub, tmp_path):
    with pytest.raises(CheckpointError, match=r"repository that you may read, got 'me/none'.*hf auth login"):
        pull(hub, tmp_path, "me/none", some.cnn())
    with pytest.raises(CheckpointError, match=r"or a repository 'owner/name', got 'no/such/folder': mind it"):
        pull(hub, tmp_path, "no/such/folder", some.cnn())


def test_no_connection(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub's client tries again for a while
    hub.shutdown()
    hub.server_close()
    with pytest.raises(CheckpointError, match=r"'me/shared' is no folder, and could not be fetched.*HF_ENDPOINT"):
        pull(hub, tmp_path, "me/shared", some.cnn())


def test_another_models_explainer_and_another_methods(hub, tmp_path):
    some.rows().push_to_hub("me/shared", endpoint=hub.url, token="t")
    other = some.cnn()
    with torch.no_grad():
        other.head.bias.add_(1)
    words = "repo_or_folder: the explainer in me/shared was fitted for TinyCNN with other weights"
    with pytest.raises(BackboneMismatchError, match=words):
        pull(hub, tmp_path, "me/shared", other)
    with pytest.warns(match="was fitted for TinyCNN with other weights"):
        pull(hub, tmp_path, "me/shared", other, strict_backbone=False)
    with pytest.raises(CheckpointError, match=r"of LCAMImg, got one of TTAME; use TTAME.from_pretrained"):
        pull(hub, tmp_path, "me/shared", some.cnn(), LCAMImg)


def test_what_cannot_be_shared(hub, tmp_path):
    with pytest.raises(NotFittedError, match="must be trained for this model"):
        TTAME(some.cnn()).push_to_hub("me/shared", endpoint=hub.url)
    assert hub.calls == []
    hub.broken = 507
    with pytest.raises(DataError, match=r"repo: must be a repository that you may write to.*got 'me/shared'"):
        some.rows().push_to_hub("me/shared", endpoint=hub.url, token="t")
    assert hub.repos["me/shared"]["commits"] == {"0" * 40: {}}
    with pytest.raises(OptionError, match="license: must be one of model, data, datasets, measures, licence, notes"):
        some.rows().save_pretrained(tmp_path / "x", license="mit")
    with pytest.raises(OptionError, match="measures: must have a number for each name, got 'good' for 'AD'"):
        some.rows().save_pretrained(tmp_path / "x", measures={"AD": "good"})
    assert not (tmp_path / "x").exists()


def test_a_full_disk(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    explainer = some.rows()
    explainer.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"folder: must be a folder that can be written.*No space left"):
        explainer.save_pretrained(tmp_path, notes="more")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_the_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(OptionError, match=r"huggingface_hub: pip install 'attrib_zoo\[hub\]'"):
        some.rows().push_to_hub("me/shared")


# ---------------------------------------------------------------------- the card


def text(explainer, **told):
    return card(to_checkpoint(explainer, explainer._fitted), about(**told), "me/shared")


def test_the_card_is_filled_in():
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with huggingface_hub")
    explainer = some.rows()
    found = text(explainer, **TOLD)
    assert yaml.safe_load(found.split("---")[1]) == {
        "library_name": "attrib_zoo",
        "license": "apache-2.0",
        "base_model": "timm/resnet18.a1_in1k",
        "datasets": ["imagenet-1k"],
        "tags": ["attrib_zoo", "explainability", "saliency-map", "ttame"],
    }
    for line in (
        "# TTAME for TinyCNN",
        "| class | `TinyCNN` |",
        "| weights from | timm/resnet18.a1_in1k |",
        f"| SHA-256 of its weights | `{explainer._fitted.backbone}` |",
        "| classes | 5 |",
        "| layers that are read (channels) | `stages.2` (16) |",
        "4 images of noise | nothing else",
        "No step was trained on it: the weights are the classifier's own rows.",
        "| recipe | `rows` |",
        "| steps | 0 |",
        "| rows | exact: after the layer, the model is linear |",
        "| AD(15) | 71.25 |",
        "| ours IC(15) | 5.5 |",
        "apache-2.0",
        "Thanks to all.",
    ):
        assert line in found.splitlines(), line
    assert "None were given" not in found


def test_the_card_says_what_nobody_said():
    found = text(some.rows())
    for line in ("| weights from | Its author did not say. |", "None were given.", "Its author did not say."):
        assert line in found.splitlines()
    assert "Nobody has said how good its maps are" in found
    assert "license" not in found.split("---")[1]
    assert "base_model" not in found.split("---")[1]


def test_the_card_counts_classes_and_quotes_the_fits_own_measures():
    explainer = some.paper()
    explainer._fitted.counts = torch.tensor([3, 0, 9, 0, 1])
    explainer._fitted.history.validation.append({"step": 30.0, "loss": 1.23456, "AD(15)": 80.0})
    explainer._fitted.history.messages.append("fit: something to know")
    found = text(explainer, model="torchvision's resnet18")
    assert "saw 13 images, repeats included, and the model assigned them to 3 of 5 classes" in found
    assert "per class 0 at least, 1 in the middle, 9 at most" in found
    assert "* 2 of 5 classes never came up in the fit, so their maps are untrained: 1, 3." in found.splitlines()
    assert "| loss | 1.235 |" in found.splitlines()
    assert "| AD(15) | 80 |" in found.splitlines()
    assert "> fit: something to know" in found.splitlines()
    assert "base_model" not in found


def test_a_bar_in_a_cell_does_not_end_it():
    assert "| weights from | a \\| b |" in text(some.rows(), model="a | b").splitlines()
