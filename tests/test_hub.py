"""The stand-in answers the real clients as the Hub does."""

import subprocess
import sys
from pathlib import Path

import pytest
from hub import READ_TOKEN, TOKEN
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelCard,
    create_repo,
    hf_hub_download,
    metadata_load,
    model_info,
    snapshot_download,
    upload_file,
    upload_folder,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def test_create_upload_and_download(hub, logged_in, tmp_path):
    assert create_repo("org/net").repo_id == "org/net"
    with pytest.raises(HfHubHTTPError, match="409"):
        create_repo("org/net")
    create_repo("org/net", exist_ok=True)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "b.bin").write_bytes(bytes(range(256)))
    (tmp_path / "in" / "a.txt").write_text("one")
    first = upload_folder(folder_path=tmp_path / "in", repo_id="org/net", commit_message="Both")
    second = upload_file(path_or_fileobj=b"two", path_in_repo="a.txt", repo_id="org/net")
    assert hub.files("org/net") == {"a.txt": b"two", "deep/b.bin": bytes(range(256))}
    assert hub.history("org/net")[1:] == ["Both", "initial commit"]
    assert model_info("org/net").sha == second.oid
    for revision, text in {first.oid: "one", "main": "two", None: "two"}.items():
        path = hf_hub_download("org/net", "a.txt", revision=revision)
        assert Path(path).read_text() == text
    folder = snapshot_download("org/net", allow_patterns=["deep/*"])
    assert folder.endswith(second.oid)
    assert Path(folder, "deep", "b.bin").read_bytes() == bytes(range(256))


def test_revisions(hub, logged_in):
    api = HfApi()
    old = hub.commit("org/net", {"a": b"1"})
    api.create_tag("org/net", tag="v1")
    api.create_branch("org/net", branch="try")
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id="org/net", revision="try")
    assert hub.files("org/net") == {"a": b"1"}
    assert hub.files("org/net", "try") == {"a": b"2"}
    assert Path(hf_hub_download("org/net", "a", revision="v1")).read_text() == "1"
    assert model_info("org/net", revision="v1").sha == old
    assert {ref.name for ref in api.list_repo_refs("org/net").branches} == {"main", "try"}
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("org/net", "a", revision="v2")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/net", "b")
    new = CommitOperationAdd("a", b"3")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("org/net", [new], commit_message="x", parent_commit="0" * 40)


def test_who_may_what(hub):
    hub.commit("org/secret", {"a": b"1"}, private=True)
    hub.commit("org/net", {"a": b"1"})
    for token in (False, READ_TOKEN):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("org/secret", "a", token=token)
        with pytest.raises(RepositoryNotFoundError):
            model_info("org/gone", token=token)
        with pytest.raises(HfHubHTTPError, match=r"40[134]"):
            upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id="org/net", token=token)
    hf_hub_download("org/secret", "a", token=TOKEN)
    hf_hub_download("org/net", "a")
    with pytest.raises(HfHubHTTPError, match="401"):
        model_info("org/net", token="hf_expired")
    with pytest.raises(HfHubHTTPError, match="403"):
        create_repo("other/net", token=TOKEN)
    assert hub.files("org/net") == {"a": b"1"}


def test_failures(hub, logged_in):
    data = bytes(1000)
    hub.commit("org/net", {"a": data})
    hub.cut("GET .*/resolve/")
    assert Path(hf_hub_download("org/net", "a")).read_bytes() == data  # resumed
    hub.fail("POST .*/preupload/", times=2)
    upload_file(path_or_fileobj=b"2", path_in_repo="b", repo_id="org/net")
    assert sum("preupload" in request for request in hub.requests) == 3
    hub.cut("POST .*/commit/")
    with pytest.raises(Exception, match="disconnected"):
        upload_file(path_or_fileobj=b"3", path_in_repo="b", repo_id="org/net")
    assert hub.files("org/net")["b"] == b"2"
    hub.cut("POST .*/commit/", after=True)
    with pytest.raises(Exception, match="disconnected"):
        upload_file(path_or_fileobj=b"3", path_in_repo="b", repo_id="org/net")
    assert hub.files("org/net")["b"] == b"3"


def test_cards(hub, logged_in):
    card = "---\nlicense: mit\ntags: [a]\nlibrary_name: x\n---\n# Net\n"
    create_repo("org/net")
    ModelCard(card).push_to_hub("org/net")
    info = model_info("org/net")
    assert (info.library_name, info.tags, info.card_data["license"]) == ("x", ["a"], "mit")
    assert metadata_load(hf_hub_download("org/net", "README.md"))["license"] == "mit"
    with pytest.raises(ValueError, match="Invalid metadata"):
        upload_file(
            path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", repo_id="org/net"
        )


def test_offline_and_unreachable(hub):
    hub.commit("org/net", {"a": b"1"})
    with hub.offline(), pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("org/net", "a")
    path = hf_hub_download("org/net", "a")
    with hub.offline():
        assert hf_hub_download("org/net", "a") == path
    hub.close()
    assert hf_hub_download("org/net", "a") == path


def test_client_in_another_process(hub):
    hub.commit("org/secret", {"a": b"1"}, private=True)
    code = "import huggingface_hub as h; assert open(h.hf_hub_download('org/secret', 'a')).read()"
    for token, succeeds in ((None, False), (TOKEN, True)):
        environment = hub.environment(token=token)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
        assert (done.returncode == 0) == succeeds, done.stderr
