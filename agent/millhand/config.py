"""What the owner wants: one TOML file, overlaid by the environment. Unknown keys are refused.

Every key can also be set as MILLHAND_<SECTION>__<KEY> (for example MILLHAND_NODE__ID=press-7); MODEL_PATH adds a
folder of models; CUDA_VISIBLE_DEVICES narrows the GPUs as in any other program of the field.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from millhand.control import SOCKET_NAME_BYTES_CAP, SOCKET_PATH_BYTES_CAP
from millhand.errors import ConfigError
from millhand.language.knowledge import KnowledgeSettings
from millhand.language.pack import PackSettings
from millhand.language.settings import LanguageSettings
from millhand.log_settings import LogSettings
from millhand.pipeline.settings import AssetSettings, OrderSettings, RecordingSettings
from millhand.serving.openai.settings import GatewaySettings
from millhand.serving.settings import GrpcSettings, HttpSettings, ModelSettings, TracingSettings
from millhand.store.settings import StoreSettings
from millhand.telemetry.settings import TelemetrySettings
from millhand.validation import StrictTable, read_toml, validate
from millhand.workshop.settings import WorkshopSettings

DEFAULT_PATH = Path("/etc/millhand/millhand.toml")
PREFIX = "MILLHAND_"
# Variables that start with the prefix and are not keys.
NOT_KEYS = frozenset({"MILLHAND_CONFIG", "MILLHAND_DATA"})
HUB_PREFIX = "MILLHAND_HUB_"  # the hub's own; both may run on one machine
DEFAULT_PLUGINS = ("boards", "onnxruntime", "orders")
LANGUAGE_PLUGINS = ("llamacpp", "vllm", "edgellm")
"""Loaded beside them where a language model is named: which of them serves is told by what the node has."""

GUARD_PLUGINS = ("guard",)
"""Loaded where the gateway serves; `enabled = false` in [plugins.guard] leaves it out."""


class NodeSettings(StrictTable):
    id: str = Field(default_factory=lambda: re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname()) or "node")
    """This node's name in the fleet (the Sparkplug edge node id). Default: the host name."""
    group: str = "millhand"
    """The plant or line that the node belongs to (the Sparkplug group id)."""
    data_dir: Path = Path("/var/lib/millhand")
    """Where the store and the node's own key live."""
    run_dir: Path = Path("/run/millhand")
    """Where sockets live; a short path, for the kernel's sake."""
    profile: str = "auto"
    """A hardware profile by name, or `auto` to match it."""
    profiles_dir: Path | None = None
    """A folder of your own profiles; they win over the shipped ones of the same name."""
    hardware_root: Path | None = None
    """Read the hardware from this folder of recordings instead of the live machine."""

    @field_validator("id", "group")
    @classmethod
    def _topic_safe(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", value):
            raise ValueError("must be letters, digits, '_', '.' or '-' (it becomes part of an MQTT topic)")
        return value

    @field_validator("run_dir")
    @classmethod
    def _takes_sockets(cls, value: Path) -> Path:
        bytes_cap = SOCKET_PATH_BYTES_CAP - SOCKET_NAME_BYTES_CAP - 1
        if len(os.fsencode(value)) > bytes_cap:
            raise ValueError(
                f"its {len(os.fsencode(value))} bytes leave no room for the names of sockets, whose paths the kernel "
                f"limits; name a folder of at most {bytes_cap} bytes, such as /run/millhand"
            )
        return value

    @property
    def control_path(self) -> Path:
        return self.run_dir / "control.sock"

    @property
    def models_dir(self) -> Path:
        """Models that the node made or fetched itself."""
        return self.data_dir / "models"

    @property
    def store_path(self) -> Path:
        return self.data_dir / "millhand.db"


class Config(StrictTable):
    node: NodeSettings = NodeSettings()
    log: LogSettings = LogSettings()
    store: StoreSettings = StoreSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    models: ModelSettings = ModelSettings()
    http: HttpSettings = HttpSettings()
    grpc: GrpcSettings = GrpcSettings()
    gateway: GatewaySettings = GatewaySettings()
    tracing: TracingSettings = TracingSettings()
    language: LanguageSettings = LanguageSettings()
    orders: OrderSettings = OrderSettings()
    recording: RecordingSettings = RecordingSettings()
    workshop: WorkshopSettings = WorkshopSettings()
    pack: PackSettings = PackSettings()
    knowledge: KnowledgeSettings = KnowledgeSettings()
    plugins: dict[str, dict[str, Any]] = {}
    """One table a plugin. `enabled = false` leaves it out; `required = true` makes its failure fatal."""
    assets: tuple[AssetSettings, ...] = ()

    @model_validator(mode="after")
    def _unique_assets(self) -> Config:
        names = [asset.name for asset in self.assets]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two assets are called '{name}'; give each its own name")
        return self

    def plugin_tables(self) -> dict[str, dict[str, Any]]:
        """The plugins to load with their tables: those named, those that adapters name, and the defaults."""
        language = LANGUAGE_PLUGINS if self.language.model else ()
        adapters = (asset.adapter.split(".")[0] for asset in self.assets)
        guards = GUARD_PLUGINS if self.serves_gateway else ()
        names = [*DEFAULT_PLUGINS, *language, *guards, *adapters, *self.plugins]
        return {name: dict(self.plugins.get(name, {})) for name in dict.fromkeys(names)}

    @property
    def serves_gateway(self) -> bool:
        """Whether OpenAI's API is served."""
        if self.gateway.enabled == "auto":  # a node must not fail for what it did not ask for
            return bool(self.language.model) and find_spec("aiohttp") is not None
        return self.gateway.enabled

    def models_needed(self) -> list[str]:
        """The models that assets name."""
        return list(dict.fromkeys(model for asset in self.assets for model in asset.models))


def load_config(path: Path | None = None, environment: Mapping[str, str] | None = None) -> Config:
    """Read and check the configuration. Raises ConfigError that names file, key and value.

    Without a path, /etc/millhand/millhand.toml is read if it exists; else the defaults hold.
    """
    environment = os.environ if environment is None else environment
    if path is not None or DEFAULT_PATH.exists():
        source = path or DEFAULT_PATH
        data = read_toml(source)
        label = f"config '{source}'"
    else:
        data, label = {}, "config (defaults)"
    variables = _overlay(data, environment)
    if model_path := environment.get("MODEL_PATH"):
        models = data.setdefault("models", {})
        models["paths"] = [*models.get("paths", []), *model_path.split(os.pathsep)]
        variables["models", "paths"] = "MODEL_PATH"
    return validate(Config, data, label, variables)


def _overlay(data: dict[str, Any], environment: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    """Lay the environment over `data`; returns key path -> the variable that set it. Raises ConfigError."""
    variables: dict[tuple[str, ...], str] = {}
    for name, text in sorted(environment.items()):
        if not name.startswith(PREFIX) or name in NOT_KEYS or name.startswith(HUB_PREFIX):
            continue
        keys = name.removeprefix(PREFIX).lower().split("__")
        if len(keys) < 2:
            raise ConfigError(
                f"environment variable '{name}' names no key",
                hint=f"write {PREFIX}<SECTION>__<KEY>, for example {PREFIX}NODE__ID",
            )
        table = data
        for depth, key in enumerate(keys[:-1], start=1):
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise ConfigError(
                    f"environment variable '{name}': key '{'.'.join(keys[:depth])}' is no table",
                    hint="a variable sets one key of a table; write lists such as assets in the file",
                )
        table[keys[-1]] = _value(text)
        variables[tuple(keys)] = name
    return variables


def _value(text: str) -> Any:
    """Read `text` as a TOML value; what is none is a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
