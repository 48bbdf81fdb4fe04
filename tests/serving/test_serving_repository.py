"""Model folders: good ones are found, bad ones are reported and left out."""

from __future__ import annotations

import pytest
from proof_kit import prove
from serving_kit import identity, scale, write_faulty, write_model

from millhand.config import Config
from millhand.errors import ModelError
from millhand.proof.signature import Keyring
from millhand.serving.repository import Repository


def good(root, name, **options):
    folder = write_model(root, name, **options)
    identity(folder / "1/model.onnx")
    return folder


def test_bad_folders_are_reported_and_left_out(root):
    good(root, "good")
    write_model(root, "empty")
    folder = good(root, "typo")
    (folder / "model.toml").write_text((folder / "model.toml").read_text() + "\nmax_bach = 3\n")
    good(root, "broken").joinpath("model.toml").write_text("name = [")
    good(root, "renamed").rename(root / "other")
    toml = good(root, "fixed").joinpath("model.toml")
    toml.write_text(toml.read_text().replace("[-1, 2]", "[1, 2]"))
    repository = Repository([root, root / "nowhere"])
    assert repository.names() == ["good"]
    problems = dict(repository.problems())
    assert set(problems) == {"empty", "typo", "broken", "other", "fixed", "nowhere"}
    assert "no '" in problems["empty"] and "model.onnx" in problems["empty"]
    assert "key 'outputs.0.max_bach' is not known" in problems["typo"]
    assert "is not valid TOML" in problems["broken"]
    assert "'renamed' is not its folder's name" in problems["other"]
    assert "must begin with -1" in problems["fixed"]
    with pytest.raises(ModelError, match="is not valid TOML"):
        repository.find("broken")
    with pytest.raises(ModelError, match="model 'god' is not known; did you mean 'good'"):
        repository.find("god")


def test_folders_that_look_like_versions_are_told(root):
    folder = good(root, "press")
    identity(folder / "3/modle.onnx")
    for name in ("4", "0", "V6"):
        (folder / name).mkdir()
    identity(folder / "next/model.onnx")
    for name in ("notes", ".part"):
        (folder / name).mkdir()
    found = Repository([root]).find("press")
    assert found.versions == (1,)
    assert {stray.folder: stray.reason for stray in found.strays} == {
        "3": "3/ has no 'model.onnx'; it holds modle.onnx",
        "4": "4/ has no 'model.onnx'; it is empty",
        "0": "0/ is no version: its name must be a number from 1 on, such as 1",
        "V6": "V6/ is no version: its name must be a number from 1 on, such as 6",
        "next": "next/ is no version: its name must be a number from 1 on, such as 1",
    }
    folder.joinpath("1/model.onnx").unlink()
    with pytest.raises(ModelError, match=r"has no version: .*; 1/ has no 'model.onnx'; it is empty; 3/ has no"):
        Repository([root]).find("press")


def test_a_model_without_model_toml_is_told(root):
    identity(root / "new/1/model.onnx")
    identity(root / "later/model.onnx")
    repository = Repository([root])
    assert repository.problems() == [("new", f"'{root / 'new'}' has no model.toml")]
    for name in ("new", "later"):
        with pytest.raises(ModelError, match=f"'{root / name}' has no model.toml") as caught:
            repository.find(name)
        assert caught.value.hint.startswith("write one")
    for name in ("..", "new/1", ""):
        with pytest.raises(ModelError, match="is not known"):
            repository.find(name)


def test_the_owners_folder_wins_over_a_shipped_one(root, tmp_path):
    good(root, "same")
    shipped = tmp_path / "shipped"
    good(shipped, "same")
    good(shipped, "more")
    repository = Repository.from_config(Config.model_validate({"models": {"paths": [root]}}), [shipped])
    assert repository.find("same").path == root / "same"
    assert repository.names() == ["more", "same"]


def test_a_proof_holds_for_its_artifact_only(root, tmp_path):
    folder = good(root, "proved")
    repository = Repository([root], keyring=Keyring(tmp_path / "data"))
    model = repository.find("proved")
    assert repository.verdict(model, 1).reason == "there is no proof.json"
    prove(model.subject(1), tmp_path / "data")
    before = model.fingerprint(1), model.size_bytes(1)
    assert repository.check_proof(model, 1) == "proved"
    scale(folder / "1/model.onnx", 3)
    with pytest.raises(ModelError, match=r"version 1 is refused: '.*/1/model.onnx' is not what was proved") as raised:
        repository.check_proof(model, 1)
    assert "remove proof.json" in raised.value.hint
    prove(model.subject(1), None)
    assert repository.check_proof(model, 1) == "unproved"
    after = model.fingerprint(1), model.size_bytes(1)
    assert before != after
    (folder / "1/proof.json").unlink()
    assert (model.fingerprint(1), model.size_bytes(1)) == after, "a proof is no part of what it speaks of"


async def test_require_proof_refuses_an_unproved_version(root, make_pool):
    good(root, "unproved")
    pool = await make_pool(require_proof=True)
    entry = pool.index()[0]
    assert entry["state"] == "failed" and "is unproved: there is no proof.json" in entry["reason"]


def test_policy_specific_names_existing_versions(root):
    folder = good(root, "some", extra='policy = "specific"\nversions = [4]')
    model = Repository([root]).find("some")
    with pytest.raises(ModelError, match=r"names version 4; in .* are 1"):
        model.chosen()
    identity(folder / "4/model.onnx")
    assert Repository([root]).find("some").chosen() == (4,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('name = "y"', 'name = "z"'), "the artifact has no output 'z'"),
        (("FP32", "INT64"), "input 'x' is FP32 in the artifact, INT64 in model.toml"),
        (("[-1, 2]", "[-1, 3]"), "input 'x' has shape .-1, 2. in the artifact, .-1, 3. in model.toml"),
        (
            ('backend = "onnxruntime"', 'backend = "onnxruntim"'),
            "'onnxruntim' is not known; did you mean 'onnxruntime'",
        ),
    ],
)
async def test_the_manifest_is_checked_against_the_artifact(root, make_pool, change, message):
    toml = good(root, "same") / "model.toml"
    toml.write_text(toml.read_text().replace(*change))
    pool = await make_pool()
    with pytest.raises(Exception, match=message):
        await pool.load("same")


async def test_a_damaged_artifact_is_named(root, make_pool):
    folder = good(root, "same")
    (folder / "1/model.onnx").write_bytes(b"\x08\x07garbage" * 10)
    pool = await make_pool()
    reason = pool.index()[0]["reason"]
    assert f"'{folder / '1/model.onnx'}' cannot be loaded" in reason


async def test_one_bad_model_does_not_stop_the_others(root, make_pool):
    good(root, "same")
    write_faulty(root, "faulty", versions={1: "die"})
    write_model(root, "empty")
    pool = await make_pool()
    states = {entry["name"]: entry["state"] for entry in pool.index()}
    assert states["empty"] == "bad" and states["faulty"] == "failed" and states["same"] in ("ready", "restarting")
