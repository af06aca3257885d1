"""`publish` against the stand-in for the Hub."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from quad_modifiers.tools.publishing import HubError, plan, publish

# huggingface_hub hands httpx a file in a way that httpx deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

FILES = {
    ".gitattributes",
    "README.md",
    "calibration.json",
    "checksums.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
}
REPO = "me/toy-quad"


def send(folder: Path, repo_id: str = REPO, **options):
    return publish(folder, repo_id, **{"check": False, **options})


def test_everything_arrives_in_one_commit(hub, checkpoint: Path) -> None:
    done = publish(checkpoint, REPO, message="First")
    assert done.url == f"{hub.url}/{REPO}"
    repository = hub.repositories[REPO]
    assert repository.names() == FILES
    assert not repository.private
    assert [commit["summary"] for commit in repository.commits] == ["First"]
    for name in FILES - {".gitattributes"}:
        assert hub.content(REPO, name) == (checkpoint / name).read_bytes(), name
    assert done.plan.impression is not None
    assert done.plan.impression.model_class == "QuadLlamaForCausalLM"


def test_the_second_time_nothing_is_sent(hub, checkpoint: Path) -> None:
    send(checkpoint)
    sent = len(hub.puts)
    assert sent > 3
    send(checkpoint)
    assert len(hub.puts) == sent
    assert len(hub.repositories[REPO].commits) == 1


def test_a_folder_that_cannot_be_written_to(hub, checkpoint: Path, monkeypatch, caplog) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr("quad_modifiers.tools.publishing.publication.write_card", fail)
    done = send(checkpoint)
    assert hub.content(REPO, "README.md").decode() == done.plan.card
    assert not (checkpoint / "README.md").exists()
    assert "cannot be kept in" in caplog.text
    assert "Read-only file system" in caplog.text


def test_private(hub, checkpoint: Path) -> None:
    send(checkpoint, private=True)
    assert hub.repositories[REPO].private
    send(checkpoint, private=True)


def test_an_existing_public_repository_does_not_become_private_silently(hub, checkpoint: Path) -> None:
    send(checkpoint)
    (checkpoint / "recipe.yaml").write_text("changed: true\n")
    with pytest.raises(HubError, match="exists and is public"):
        send(checkpoint, private=True)
    assert hub.content(REPO, "recipe.yaml") != b"changed: true\n"


def test_a_name_alone_is_the_users(hub, checkpoint: Path) -> None:
    assert send(checkpoint, "toy").repo_id == "me/toy"
    assert 'from_pretrained("me/toy")' in (checkpoint / "README.md").read_text()


def test_a_branch_is_made(hub, checkpoint: Path) -> None:
    send(checkpoint)
    (checkpoint / "recipe.yaml").write_text("changed: true\n")
    send(checkpoint, revision="other")
    assert hub.content(REPO, "recipe.yaml", "other") == b"changed: true\n"
    assert hub.content(REPO, "recipe.yaml") != b"changed: true\n"


def test_connection_lost_then_resumed(hub, checkpoint: Path, shard: Callable[[Path], list[str]]) -> None:
    first, second = (hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in shard(checkpoint))
    hub.drop = (second, 1)
    with pytest.raises(HubError, match=r"connection was lost.*run the same command again"):
        send(checkpoint)
    assert hub.repositories[REPO].names() == {".gitattributes"}, "half a checkpoint is visible"
    assert first in hub.objects
    assert second not in hub.objects
    before = len(hub.puts)
    hub.drop = None
    send(checkpoint)
    assert {put.split()[0] for put in hub.puts[before:]} == {second}
    for name in hub.repositories[REPO].names() - {".gitattributes"}:
        assert hub.content(REPO, name) == (checkpoint / name).read_bytes()


def test_dry_run_touches_nothing(hub, checkpoint: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    planned = plan(checkpoint, REPO, check=False)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert not hub.requests
    assert {name for name, _ in planned.files} == FILES - {".gitattributes"}
    sizes = dict(planned.files)
    assert sizes["model.safetensors"] == (checkpoint / "model.safetensors").stat().st_size
    assert sizes["README.md"] == len(planned.card.encode())
    assert planned.total == sum(sizes.values())


def test_hidden_files_stay_at_home(hub, checkpoint: Path) -> None:
    (checkpoint / ".cache").mkdir()
    (checkpoint / ".cache" / "secret").write_text("x")
    (checkpoint / ".env").write_text("HF_TOKEN=x")
    send(checkpoint)
    assert hub.repositories[REPO].names() == FILES


class TestOtherContent:
    def occupy(self, hub, checkpoint: Path, *names: str) -> None:
        send(checkpoint)
        files = hub.repositories[REPO].branches["main"]
        files.update(dict.fromkeys(names, ("regular", b"{}")))

    def test_another_model_is_not_replaced(self, hub, checkpoint: Path) -> None:
        self.occupy(hub, checkpoint)
        hub.repositories[REPO].branches["main"]["README.md"] = ("regular", b"---\ntags: [mine]\n---\n# Mine\n")
        (checkpoint / "recipe.yaml").write_text("changed: true\n")
        with pytest.raises(HubError, match=r"holds another model already \(config\.json.*--overwrite"):
            send(checkpoint)
        assert hub.content(REPO, "README.md") == b"---\ntags: [mine]\n---\n# Mine\n"
        send(checkpoint, overwrite=True)
        assert hub.content(REPO, "recipe.yaml") == b"changed: true\n"

    def test_weights_of_an_earlier_version_go(self, hub, checkpoint: Path) -> None:
        stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
        self.occupy(hub, checkpoint, *stale, "plot.png")
        (checkpoint / "recipe.yaml").write_text("changed: true\n")
        done = send(checkpoint)
        assert set(done.removed) == set(stale)
        assert hub.repositories[REPO].names() == FILES | {"plot.png"}

    def test_a_change_in_the_meantime_is_noticed(self, hub, checkpoint: Path, monkeypatch) -> None:
        send(checkpoint)
        (checkpoint / "recipe.yaml").write_text("changed: true\n")
        original = type(hub.repositories[REPO]).sha
        monkeypatch.setattr(
            type(hub.repositories[REPO]),
            "sha",
            lambda self, branch: original(self, branch) if not hub.counted("POST /api/models") else "0" * 40,
        )
        hub.requests.clear()
        with pytest.raises(HubError, match="changed in the meantime"):
            send(checkpoint)


class TestRefusals:
    def test_no_token(self, hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(HubError, match="there is no token; log in with `hf auth login`"):
            send(checkpoint)
        assert not hub.requests

    def test_wrong_token(self, hub, checkpoint: Path) -> None:
        with pytest.raises(HubError, match="does not accept the token"):
            send(checkpoint, token="hf_wrong")

    def test_token_that_may_only_read(self, hub, checkpoint: Path) -> None:
        hub.role = "read"
        with pytest.raises(HubError, match="may only read"):
            send(checkpoint)
        assert not hub.repositories

    @pytest.mark.parametrize("route", ["POST /api/repos/create", "POST /api/models/me/toy-quad/preupload"])
    def test_no_rights(self, hub, checkpoint: Path, route: str) -> None:
        hub.faults[route] = 403
        with pytest.raises(HubError, match=r"may not write to me/toy-quad.*token with write access to me"):
            send(checkpoint)

    @pytest.mark.parametrize(
        "route",
        [
            "GET /api/whoami-v2",
            "POST /api/repos/create",
            "POST /me/toy-quad.git/info/lfs",
            "POST /api/models/me/toy-quad/commit",
        ],
    )
    def test_rate_limit(self, hub, checkpoint: Path, route: str) -> None:
        hub.faults[route] = 429
        hub.fault_headers["Retry-After"] = "17"
        with pytest.raises(HubError, match=r"too many requests.*wait 17 s, then run the same command again"):
            send(checkpoint)

    @pytest.mark.parametrize("route", ["POST /api/repos/create", "POST /complete/"])
    def test_server_error(self, hub, checkpoint: Path, route: str) -> None:
        hub.faults[route] = 503
        with pytest.raises(HubError, match=r"status 503.*run the same command again"):
            send(checkpoint)
        hub.faults.clear()
        send(checkpoint)
        assert hub.repositories[REPO].names() == FILES

    def test_a_hub_without_xet(self, hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("hf_xet")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
        with pytest.raises(HubError, match="HF_HUB_DISABLE_XET=1"):
            send(checkpoint)
        assert hub.repositories[REPO].names() == {".gitattributes"}

    def test_nobody_there(self, hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(HubError, match="connection was lost"):
            send(checkpoint)

    def test_metadata_that_the_hub_refuses(self, hub, checkpoint: Path) -> None:
        hub.faults["POST /api/validate-yaml"] = 400
        with pytest.raises(ValueError, match="Invalid metadata in README"):
            send(checkpoint)

    @pytest.mark.parametrize("error", ["401", "403", "429", "503"])
    def test_messages_are_one_line_and_without_the_token(self, hub, checkpoint: Path, error: str) -> None:
        hub.faults["POST /api/repos/create"] = int(error)
        with pytest.raises(HubError) as caught:
            send(checkpoint)
        assert "\n" not in str(caught.value)
        assert "hf_of_the_stub" not in str(caught.value)

    @pytest.mark.parametrize("name", ["a/b/c", "me/../x", "me/with space", ""])
    def test_bad_name(self, hub, checkpoint: Path, name: str) -> None:
        with pytest.raises(ValueError, match=r"name for a repository|Hub id"):
            plan(checkpoint, name, check=False)

    def test_base_model_that_is_a_folder(self, hub, checkpoint: Path) -> None:
        with pytest.raises(ValueError, match="base model must be a Hub id"):
            plan(checkpoint, REPO, base_model=str(checkpoint), check=False)


class TestLicense:
    def card(self, hub, checkpoint: Path, **options) -> str:
        return plan(checkpoint, REPO, check=False, **options).card

    def test_of_the_base_models_card(self, hub, checkpoint: Path) -> None:
        base = publish(checkpoint, "me/base", check=False)
        metadata = b"---\nlicense: other\nlicense_name: toy-license\nlicense_link: LICENSE\n---\n"
        hub.repositories[base.repo_id].branches["main"]["README.md"] = ("regular", metadata)
        (checkpoint / "README.md").unlink()
        card = self.card(hub, checkpoint, base_model="me/base")
        for line in ("license: other", "license_name: toy-license", "license_link: LICENSE", "base_model: me/base"):
            assert line in card.splitlines()
        assert "base_model_relation: quantized" in card.splitlines()

    def test_argument_wins(self, hub, checkpoint: Path) -> None:
        assert "license: mit" in self.card(hub, checkpoint, base_model="me/base", license="mit").splitlines()

    def test_unknown_is_said(self, hub, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="quad_modifiers"):
            send(checkpoint, base_model="me/not-there")
        card = (checkpoint / "README.md").read_text()
        assert "license: unknown" in card.splitlines()
        assert "was not found; ask its authors" in card
        assert "give --license" in caplog.text
