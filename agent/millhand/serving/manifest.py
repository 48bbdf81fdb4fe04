"""model.toml: what a model is, what it takes, how its outputs are read and which rules judge them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from millhand.records import AssetState, Severity
from millhand.serving.tensors import DATATYPES
from millhand.validation import StrictTable, read_toml, validate

MANIFEST = "model.toml"
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
"""What a model may be called, as a pattern."""
ENSEMBLE = "ensemble"
"""The backend of a model with steps."""


class TensorSpec(StrictTable):
    name: str
    datatype: str = "FP32"
    """A datatype of the Open Inference Protocol v2."""
    shape: tuple[int, ...]
    """-1 for a free dimension; the first dimension is the batch and must be -1."""
    unit: str = ""
    description: str = ""
    finite: bool = False
    """An input's: refuse requests that hold NaN or infinity there. False passes them on to the model."""

    @model_validator(mode="after")
    def _known_datatype(self) -> TensorSpec:
        if self.datatype not in DATATYPES:
            raise ValueError(f"datatype '{self.datatype}' is none of {', '.join(DATATYPES)}")
        if not self.shape or self.shape[0] != -1 or min(self.shape) < -1:
            raise ValueError(
                f"shape {list(self.shape)} must begin with -1, the batch; -1 elsewhere is a free dimension"
            )
        if self.finite and not self.datatype.startswith("FP"):
            raise ValueError(f"finite = true goes with FP16, FP32 and FP64 only, not with {self.datatype}")
        return self


class WindowSpec(StrictTable):
    by: Literal["count", "time"] = "count"
    """count: `length` steps (one step = one source time); time: `length` seconds of source time."""
    length: float = Field(gt=0, allow_inf_nan=False)
    step: float = Field(gt=0, allow_inf_nan=False)
    """A window ends every `step` steps or seconds."""
    min_length: float = Field(default=0, ge=0)
    """The shortest history that is answered; 0 means `length`."""
    max_gap_s: float = Field(default=float("inf"), gt=0)
    """A hole in source time longer than this empties the window: the past before it does not count."""
    lateness_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """How long a step is kept open for late readings before it counts."""
    signals: tuple[str, ...] = ()
    """Scalars that the extractor needs; a step without one of them carries NaN there."""
    waveforms: tuple[str, ...] = ()
    """Waveforms that the extractor needs; without a fresh one no window is judged."""

    @model_validator(mode="after")
    def _windows_can_end(self) -> WindowSpec:
        if self.min_length > self.length:
            raise ValueError(f"min_length = {self.min_length:g} must not exceed length = {self.length:g}")
        if self.by == "count":
            for name in ("length", "step", "min_length"):
                if getattr(self, name) % 1:
                    raise ValueError(f"{name} = {getattr(self, name):g} must be a whole number of steps (by = 'count')")
        if not self.signals and not self.waveforms:
            raise ValueError("name at least one of signals and waveforms")
        return self


class FeatureSpec(StrictTable):
    extractor: str = "raw"
    """Name of a feature extractor: a built-in (`raw`, `statistics`, `spectrum`) or a plugin's."""
    options: dict[str, Any] = {}


class OutputSpec(StrictTable):
    task: Literal["classification", "regression"]
    output: str
    """The output tensor to read."""
    labels: tuple[str, ...] = ()
    """classification: the class names, in the tensor's order."""
    healthy: str = "healthy"
    """classification: the label that means no fault; `fault` = 1 - its probability."""
    softmax: bool = False
    """classification: the tensor holds logits."""
    value: str = "value"
    """regression: the name of the value, for example `rul`."""
    unit: str = "1"
    scale: float = 1.0
    """regression: the tensor times `scale` is the value in `unit`."""
    low: float = float("-inf")
    high: float = float("inf")
    """regression: the value is clipped to low..high."""

    @model_validator(mode="after")
    def _readable(self) -> OutputSpec:
        if self.task == "classification" and len(set(self.labels)) != max(len(self.labels), 1):
            raise ValueError("a classification needs labels, each once, in the output's order")
        if not self.low < self.high:
            raise ValueError(f"low = {self.low:g} must lie below high = {self.high:g}")
        return self


class RuleSpec(StrictTable):
    name: str
    value: str
    """`fault`, a label, or the regression's value name."""
    raise_above: float | None = None
    clear_below: float | None = None
    raise_below: float | None = None
    clear_above: float | None = None
    raise_after: int = Field(default=3, ge=1)
    """Debounce: so many of the last `of` judged windows must be beyond the raise limit."""
    of: int = Field(default=0, ge=0)
    """0 means the same as `raise_after`."""
    clear_after: int = Field(default=5, ge=1)
    """So many windows in a row beyond the clear limit end the alert."""
    min_windows: int = Field(default=0, ge=0)
    """The rule stays silent for so many first windows."""
    states: tuple[AssetState, ...] = (AssetState.RUNNING, AssetState.UNKNOWN)
    """The rule speaks only in these asset states; in others it neither counts nor forgets."""
    severity: Severity = Severity.WARNING
    kind: str = ""
    """The alert's kind; empty takes the class that most of the counted windows chose."""
    message: str = ""
    """Text with {asset}, {kind}, {value}, {unit}."""

    @model_validator(mode="after")
    def _one_direction(self) -> RuleSpec:
        if (self.raise_above is None) == (self.raise_below is None):
            raise ValueError("give exactly one of raise_above and raise_below")
        return self


class StepSpec(StrictTable):
    model: str = ""
    """A model of the repository, which may be an ensemble itself."""
    version: int | None = Field(default=None, ge=1)
    """`model`: this version; none takes the highest that the model's policy serves."""
    transform: str = ""
    """A built-in transform."""
    artifact: str = ""
    """A file of the ensemble's own, inside each of its version's folders."""
    backend: str = "onnxruntime"
    """`artifact`: which backend loads it."""
    inputs: dict[str, str] = {}
    """Step input -> tensor; an input that is not named takes the tensor of its own name."""
    outputs: dict[str, str] = {}
    """Step output -> tensor, of those that are kept; empty keeps all under their own names."""
    options: dict[str, Any] = {}
    """The transform's options, or `artifact`'s backend options."""

    @property
    def name(self) -> str:
        return self.model or self.transform or self.artifact

    @model_validator(mode="after")
    def _one_kind(self) -> StepSpec:
        kinds = [key for key in ("model", "transform", "artifact") if getattr(self, key)]
        if len(kinds) != 1:
            raise ValueError(f"give exactly one of model, transform and artifact, not {' and '.join(kinds) or 'none'}")
        owners = {"version": ("model",), "backend": ("artifact",), "options": ("transform", "artifact")}
        for key, owner in owners.items():
            if key in self.model_fields_set and kinds[0] not in owner:
                raise ValueError(f"key '{key}' goes with {' or '.join(owner)} only, not with {kinds[0]}")
        return self


class Manifest(StrictTable):
    name: str = Field(pattern=f"^{NAME}$")
    description: str
    licence: str
    backend: str = "onnxruntime"
    artifact: str = "model.onnx"
    """File name inside each version's folder."""
    policy: Literal["latest", "all", "specific"] = "latest"
    versions: tuple[int, ...] = ()
    """policy `specific`: the versions to serve."""
    max_batch: int = Field(default=64, ge=1)
    max_delay_us: int | None = Field(default=None, ge=0, le=1_000_000)
    """How long a request may wait for others to share an inference with; none takes the profile's."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    window: WindowSpec | None = None
    """None: the model is served, but no pipeline may use it."""
    features: FeatureSpec = FeatureSpec()
    prediction: OutputSpec | None = None
    rules: tuple[RuleSpec, ...] = ()
    hang_ms: float | None = Field(default=None, gt=0)
    """An inference that takes longer hangs, and its worker is started again; none takes `[models] hang_ms`."""
    memory_bytes_cap: int = Field(default=0, ge=0)
    """A version that takes more memory is refused at its load; 0 allows all."""
    warmup: int = Field(default=1, ge=0)
    """Inferences run on zeros before the model is ready."""
    metadata: dict[str, Any] = {}
    options: dict[str, Any] = {}
    """Backend options for this model alone; they win over the plugin's table."""
    isolation: Literal["auto", "shared", "own"] = "auto"
    """Which worker: auto = its own on an accelerator, one shared by all models on the CPU."""
    accelerator: Literal["auto", "cpu"] = "auto"
    """auto: where the profile puts models; cpu: on the CPU even where there is an accelerator."""
    spread: bool = False
    """With several accelerators: live on all and share out the requests, else on the one with the most free memory."""
    steps: tuple[StepSpec, ...] = ()
    """An ensemble: steps run one after another in place of an artifact."""

    @model_validator(mode="before")
    @classmethod
    def _ensemble_has_no_artifact(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not data.get("steps"):
            return data
        for key in ("artifact", "options"):
            if key in data:
                raise ValueError(f"key '{key}' does not go with [[steps]]; give it to the step or the model it is for")
        if data.get("backend", ENSEMBLE) != ENSEMBLE:
            raise ValueError(f"key 'backend' = {data['backend']!r} does not go with [[steps]]; leave it out")
        return {**data, "artifact": MANIFEST, "backend": ENSEMBLE}

    @model_validator(mode="after")
    def _only_inputs_are_checked(self) -> Manifest:
        for tensor in self.outputs:
            if tensor.finite:
                raise ValueError(f"output '{tensor.name}': key 'finite' goes with inputs only")
        return self

    @property
    def backends(self) -> set[str]:
        """The backends that load the model's own artifacts."""
        return {step.backend for step in self.steps if step.artifact} if self.steps else {self.backend}

    def specs(self, tensors: tuple[TensorSpec, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> (NumPy dtype name, shape), as sessions state theirs."""
        return {tensor.name: (DATATYPES[tensor.datatype], tensor.shape) for tensor in tensors}


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/model.toml`. Raises ConfigError naming file, key and value."""
    path = folder / MANIFEST
    return validate(Manifest, read_toml(path), f"model '{path}'")
