"""A path with a typing error may look like a model of the Hub, and is told as both."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streamconv.calibration import texts
from streamconv.checkpoint.index import open_index
from streamconv.cli.main import main
from streamconv.errors import CheckpointError, UsageError
from streamconv.hub.problems import is_transient
from tests import tiny
from tests.e2e.hub_run import hub, run
from tests.e2e.hub_server import REPO, Hub

__all__ = ["hub"]  # the fixture
BOTH = "error: there is no folder or file {} here, and as a model of the Hub: "
COMMANDS = (["convert", "MODEL", "out"], ["plan", "MODEL"], ["inspect", "MODEL"])


@pytest.mark.parametrize(
    ("answer", "says"), [((404, "RepoNotFound"), "no such model"), ((401, ""), "hf auth login"), ((403, ""), "refuses")]
)
def test_a_name_that_is_nothing(hub: Hub, tmp_path: Path, answer: tuple[int, str], says: str) -> None:
    hub.fail["/api/models"] = answer
    done = run(hub, tmp_path, "plan", "m/smal")
    assert done.returncode == 9 and done.stderr.startswith(BOTH.format("m/smal")) and done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_offline(hub: Hub, tmp_path: Path, command: list[str]) -> None:
    words = [word.replace("MODEL", "m/smal") for word in command]
    done = run(hub, tmp_path, *words, HF_HUB_OFFLINE="1")
    assert done.returncode == 9 and done.stderr.startswith(BOTH.format("m/smal")) and "offline" in done.stderr, done.stderr


def test_offline_is_not_tried_again() -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    assert not is_transient(OfflineModeIsEnabled("HF_HUB_OFFLINE")) and is_transient(ConnectionError("reset"))


def test_no_network(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "inspect", "m/smal", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 9 and done.stderr.startswith(BOTH.format("m/smal")) and done.stderr.count("\n") == 1, done.stderr
    assert "check the network" in done.stderr


def test_a_marked_name_is_of_the_hub_alone(hub: Hub, tmp_path: Path) -> None:
    hub.fail["/api/models"] = (404, "RepoNotFound")
    done = run(hub, tmp_path, "plan", f"hf://{REPO}")
    assert done.returncode == 9 and "no such model" in done.stderr and "folder or file" not in done.stderr, done.stderr


def test_what_the_hub_has_is_no_missing_folder(hub: Hub, tmp_path: Path) -> None:
    hub.fail["resolve/main/config.json"] = (403, "GatedRepo")
    done = run(hub, tmp_path, "plan", REPO)
    assert done.returncode == 9 and "is gated" in done.stderr and "folder or file" not in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["m/small/deep", "../m/smal", "./m/smal", "/m/smal", "m/", "m/smal/", "..", "smal", "~/m"])
@pytest.mark.parametrize(
    "command", [*COMMANDS, ["verify", "made", "--source", "MODEL"], ["calibrate", "MODEL", "-o", "r", "--text", "t.txt"]]
)
def test_paths_that_no_model_is_called(
    name: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == ".." and "out" in command:
        command = ["plan", "MODEL"]
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    if "made" in command:
        made = tmp_path / "inner" / "made"
        assert main(["convert", str(tiny.write(tmp_path / "inner" / "model")), str(made), "-q"]) == 0
    Path("t.txt").write_text("words")
    assert main([word.replace("MODEL", name) for word in command]) == 3
    told = capsys.readouterr().err
    wanted = "missing config.json in .." if name == ".." else f"no such file or folder: {Path(name)}"
    assert wanted in told and told.count("\n") == 1


# ---- other files


@pytest.mark.parametrize("name", ["absent", "absent.toml", "a/b/absent.yaml", "absent.json", "folder"])
def test_a_recipe_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    assert main(["plan", "model", "--config", name]) == 2
    told = capsys.readouterr().err
    shown = "folder/streamconv.json" if name == "folder" else name
    assert f"--config {shown}: No such file" in told and told.count("\n") == 1


@pytest.mark.parametrize("name", ["absent.txt", "./absent", "a/b/absent", "/absent"])
def test_a_text_that_is_not_there(name: str) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        texts.load_texts(name, 4)


def test_a_text_that_may_be_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match="no file or folder ccdv/cnn_dailymail here") as caught:
        texts.load_texts("ccdv/cnn_dailymail", 4)
    assert "a text file works offline" in str(caught.value) and "--calib_dataset" in str(caught.value)


# ---- the Hub's cache


def test_the_root_of_a_repository_in_the_cache(tmp_path: Path) -> None:
    root = tmp_path / "models--org--name"
    for number, name in enumerate(("aaa", "ccc", "bbb")):
        snapshot = tiny.write(root / "snapshots" / name)
        os.utime(snapshot, (1000 + number, 1000 + number))
    (root / "snapshots" / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"missing config\.json") as caught:
        open_index(root)
    assert caught.value.hint is not None and caught.value.hint.endswith(f"which is in {root}/snapshots/bbb")
    open_index(root / "snapshots" / "bbb").close()


def test_other_folders_get_the_old_hint(tmp_path: Path) -> None:
    (tmp_path / "snapshots" / "empty").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "snapshots"):
        with pytest.raises(CheckpointError) as caught:
            open_index(folder)
        assert caught.value.hint == "a checkpoint folder holds config.json beside its weights"
