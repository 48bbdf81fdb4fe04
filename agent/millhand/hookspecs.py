"""The whole plugin contract.

A plugin is a module that an entry point of the group `millhand` names. It implements any of the hooks below with
`@hookimpl` and returns small objects that follow the protocols of this file. Further abilities are optional extra
protocols, found with isinstance.

Lifecycle: the core imports a plugin when config or profile names it; asks `millhand_config` and validates the plugin's
table; then calls the other hooks once each, with the validated config. Each import and each hook implementation runs
under a guard of its own: one that raises is reported in `plugin list` and left out. Nothing heavy (onnxruntime,
tensorrt, torch) may be imported by a plugin's module: backends are imported in workers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import pluggy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pydantic import BaseModel

    from millhand.language.guarding import AnswerStream, GuardContext, Stage, Verdict
    from millhand.language.launch import Ability, Command, Launch, ServerFigures, Speculation
    from millhand.language.pack import Pack
    from millhand.language.passages import Passage
    from millhand.pipeline.windows import Window
    from millhand.records import Alert, Batch, WorkOrder
    from millhand.workshop.recipe import Job, Made, Recipe, Target

hookspec = pluggy.HookspecMarker("millhand")
hookimpl = pluggy.HookimplMarker("millhand")


# ---- what hooks return ----------------------------------------------------------------------------------------------


class Adapter(Protocol):
    """Reads one asset. No adapter can write to a machine: this protocol has no way to."""

    async def open(self, cursor: bytes | None) -> None:
        """Connect and resume after `cursor` (the last committed one; None at first start).

        Raises AdapterError, naming address or file; the core retries it with back-off.
        """

    def batches(self) -> AsyncIterator[Batch]:
        """Yield batches until the source ends. Raising AdapterError makes the core close, back off and open again."""

    async def close(self) -> None:
        """Release everything; may be called twice, and after a failed open."""


@runtime_checkable
class CountsFaults(Protocol):
    """An adapter that counts what it left out or mended, such as `bad_rows`; shown in the asset's status."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Kind of fault -> how often since the adapter was made."""


class AdapterKind(Protocol):
    """A kind of adapter: `[[assets]] adapter = "<name>"` picks it, `[assets.options]` is validated by `options`."""

    name: str
    options: type[BaseModel]

    def create(self, asset: str, options: Any) -> Adapter:
        """Make an adapter for one asset. Must not connect yet."""


class Health(NamedTuple):
    """How it stands with what a session depends on."""

    facts: Sequence[tuple[str, str]]
    """(label, words), a line each of `model show`: `upstream`, `http://…: circuit open`."""
    trouble: str = ""
    """Why the session cannot answer now; empty where it can."""
    hint: str = ""
    """What to do about it."""


class Session(Protocol):
    """A loaded model inside a worker."""

    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    """Input name -> (NumPy dtype name, shape; -1 for a free dimension, the first is the batch)."""
    outputs: Mapping[str, tuple[str, tuple[int, ...]]]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one batch; the worker has checked names, dtypes and shapes against `inputs`.

        Called by one thread at a time, unless the session has an attribute `concurrent` that is true.
        """

    def close(self) -> None:
        """Free the model's memory."""


@runtime_checkable
class DeadlineSession(Protocol):
    """A session that waits for something outside the worker, and therefore keeps the deadline itself."""

    def run_until(self, inputs: Mapping[str, NDArray[Any]], deadline_ns: int) -> dict[str, NDArray[Any]]:
        """As `Session.run`, until `deadline_ns` (CLOCK_MONOTONIC; 0 for none): the latest of the batch's requests.

        Raises DeadlineError where it passes, WorkerError where what it waits for fails. Both end the whole batch: its
        requests are not tried one by one. A WorkerError in the warm-up does not fail the load.
        """


@runtime_checkable
class CountingSession(Protocol):
    """A session that counts, such as `local`: how often it answered from a local artifact; shown in its stats."""

    counts: Mapping[str, int]
    """What happened -> how often since the load. The same mapping for life, with all its keys from the beginning."""


@runtime_checkable
class DependentSession(Protocol):
    """A session that depends on something outside the worker, such as another server."""

    def health(self) -> Health:
        """How it stands with that now. Called every few seconds, by any thread; must not wait."""


@runtime_checkable
class ProvingSession(Session, Protocol):
    """A session on an accelerator, which may be missing or fall back: it proves itself before it serves."""

    proof: Mapping[str, Any]
    """The evidence, plain data for `model show`: at least `provider`, `nodes` and `gpu_nodes` (of the graph),
    `max_difference` (from the CPU's answer, as a share of the largest value; None where the CPU cannot run it)."""

    def prove(self, inputs: Mapping[str, tuple[str, tuple[int, ...]]], max_batch: int) -> None:
        """Run a real inference and set `proof`. Called once after the load, before any `run`.

        inputs: as `Session.inputs`, as model.toml declares them. max_batch: the most rows that a run will usually
        bring. Raises ModelError where the accelerator is not used, or gives wrong answers.
        """


class Backend(Protocol):
    """Loads artifacts; lives in a worker. `accelerator` is "cpu" or a GPU/MIG UUID."""

    name: str
    suffixes: tuple[str, ...]

    def load(self, artifact: Path, accelerator: str, options: Mapping[str, Any]) -> Session:
        """Raises ModelError naming the file and the remedy."""


@runtime_checkable
class ThreadedBackend(Protocol):
    """A backend whose sessions on the CPU compute with `options["threads"]` threads."""

    threaded: bool
    """Says so by being there. Where the owner leaves the number open, several are tried at the load."""


@runtime_checkable
class PreparedBackend(Protocol):
    """A backend with a large library of its own."""

    def prepare(self) -> None:
        """Import it. Called before each load, so that the library does not count as the model's memory."""


@runtime_checkable
class DeclaredBackend(Protocol):
    """A backend whose artifact does not say what the model takes and gives: it is told what model.toml declares."""

    def load_declared(
        self,
        artifact: Path,
        accelerator: str,
        options: Mapping[str, Any],
        inputs: Mapping[str, tuple[str, tuple[int, ...]]],
        outputs: Mapping[str, tuple[str, tuple[int, ...]]],
    ) -> Session:
        """In place of `Backend.load`. `inputs`, `outputs`: as `Session` has them."""


@dataclass(frozen=True)
class Trial:
    """A part of a backend that may not work on this machine, and a small model to try it with."""

    part: str
    """What people call it: `cuda`."""
    artifact: Path
    options: Mapping[str, Any]
    """What the backend is told beside its plugin's table."""
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    """As `Session` has them."""
    outputs: Mapping[str, tuple[str, tuple[int, ...]]]
    asked: bool = True
    """False where nobody named the part: a build that lacks it (ProviderMissingError) keeps no model from serving."""


@runtime_checkable
class TriedBackend(Backend, Protocol):
    """A backend whose parts are tried before a model needs them: by `millhand check`, and by the agent at its start."""

    def trials(self, accelerator: str, options: Mapping[str, Any]) -> Sequence[Trial]:
        """What to try. options: the plugin's table, with a model's own options over it.

        A trial is a load in a worker, proof and warm-up included. Raises ModelError where the options cannot be.
        """


class Maker(Protocol):
    """Makes candidates of a model: engines for one kind of hardware, or files of a lower precision.

    Lives in a process of its own, one for each job, which ends by deadline: Python 3.10, and heavy imports are allowed
    inside the two calls. It judges nothing; the workshop proves what it makes.
    """

    name: str

    def recipes(self, target: Target) -> Sequence[Recipe]:
        """What it can make for a target on this machine; empty where a library is missing, or the target is not its
        own. Must not import heavy libraries. Raises ModelError where its own table is wrong for the target.
        """

    def make(self, recipe: Recipe, job: Job) -> Made:
        """Write the candidate to `job.folder`. Raises ModelError naming the node of the graph, and the remedy."""


@runtime_checkable
class KeyedMaker(Maker, Protocol):
    """A maker whose candidates are tied to more than the target: a library, a driver, one GPU."""

    def key(self, target: Target) -> Mapping[str, str]:
        """What the `Made.key` of a candidate would hold if it were made now, or more; heavy imports are allowed.

        A candidate is stale where an entry of its own key is missing here or differs, and is then made anew. Asked once
        in a daemon's life for each target, in a process of its own with a deadline. Raises ModelError where it cannot
        be told, such as without a driver: then the candidate does not serve.
        """


class Evaluation(Protocol):
    """What a model is judged by."""

    model: str
    metric: str
    """`accuracy` (the truth is class numbers) or `rmse` (the truth is in the unit of `[prediction]`)."""

    def examples(self, data: Path | None) -> Examples:
        """Calibration rows and held-out rows, the same at each call with the same data.

        data: a folder or file that the owner names; None for what the plugin itself can give. Raises InputError
        naming what it needs.
        """


@dataclass(frozen=True)
class Examples:
    """Rows for one model; input name -> array with the batch first."""

    calibration: Mapping[str, NDArray[Any]]
    """From machines or lives that no row of `held` comes from."""
    held: Mapping[str, NDArray[Any]]
    truth: NDArray[Any]
    """(rows,) class numbers (int64) or values (float64)."""
    source: str
    """Where they come from, for people."""


class FeatureExtractor(Protocol):
    """Turns one window into a model's input tensors (NumPy only; runs in the daemon).

    `name` is what `[features] extractor` in model.toml says.
    """

    name: str

    def extract(self, window: Window) -> Features | None:
        """Return the tensors, or None where the window cannot be judged (for example the machine stands still)."""


class Features(Protocol):
    """What an extractor returns; `millhand.pipeline.features.FeatureSet` is the plain implementation."""

    @property
    def tensors(self) -> Mapping[str, NDArray[np.float32]]:
        """Input name -> array WITHOUT the batch dimension."""

    @property
    def evidence(self) -> Mapping[str, float]:
        """Measured facts for people, keys with units: {"velocity_rms_mm_s": 4.2}."""


class OrderWriter(Protocol):
    """Writes the work order for an alert. `history`: earlier alerts of the asset, newest first."""

    name: str

    def write(self, alert: Alert, history: Sequence[Alert]) -> WorkOrder:
        """Must be deterministic in `id`: one alert has one order."""


@runtime_checkable
class Sink(Protocol):
    """A door out of the node beside the hub. Records are offered in order, again after an error, across restarts."""

    name: str

    async def deliver(self, record: Alert | WorkOrder) -> None:
        """Return when the other side has it for good. Raises SinkError to be offered it again later."""

    async def close(self) -> None:
        """Release everything."""


class OrderReviser(Protocol):
    """Makes a better work order of the deterministic writer's draft, with a language model and what was retrieved."""

    name: str

    async def revise(
        self,
        draft: WorkOrder,
        alert: Alert,
        history: Sequence[Alert],
        passages: Sequence[Passage],
        pack: Pack,
        complete: Complete,
    ) -> WorkOrder:
        """Return a new version, in the draft's language; `passages` is what the knowledge base found, best first, and
        `pack` what the field knows: causes and steps for the alert's kind, terms, prompts.

        The core validates it, field by field, and strikes what stands neither in the evidence nor in a cited passage;
        identity, priority and evidence stay the draft's. Raises MillhandError where it cannot: the draft stands.
        """


class Complete(Protocol):
    """Asks the node's language model, behind its guards; what order revisers and conversations are given."""

    @property
    def parameters(self) -> int:
        """Weights of the model; 0 where they are not known. Small models choose, large ones write."""

    async def __call__(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        schema: Mapping[str, Any] | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """The answer's text; JSON by `schema` where one is given. Raises LanguageError, DeadlineError, RefusedError."""

    async def score(self, messages: Sequence[Mapping[str, str]], candidates: Sequence[str]) -> Sequence[float]:
        """How well each candidate fits as the answer, higher is better; in the candidates' order."""


class KnowledgeBase(Protocol):
    """Manuals, past orders and parts lists, and the way to find what is in them."""

    name: str

    async def open(self, folder: Path, embed: Embed | None) -> None:
        """Begin with what lies in `folder`. `embed` is None where no embedding model is served: text search alone."""

    async def use(self, embed: Embed) -> None:
        """An embedding model is served now, which was not when it was opened."""

    async def add(self, path: Path, assets: Sequence[str] = (), kind: str = "manual") -> Mapping[str, Any]:
        """Take a file or a folder in; what is known already is not read again. Returns counts. Raises InputError."""

    async def add_text(self, source: str, text: str, assets: Sequence[str] = (), kind: str = "order") -> int:
        """Take a text in that is no file, such as a past order; one of the same name is replaced, an empty text
        removes it. Returns how many passages are new. Raises InputError."""

    async def remove(self, source: str) -> int:
        """Forget a source at once; returns how many passages that were."""

    async def sources(self) -> Sequence[Mapping[str, Any]]:
        """What is known: source, kind, assets, passages, bytes, when."""

    async def search(self, query: str, asset: str = "", limit: int = 5, kinds: Sequence[str] = ()) -> Sequence[Passage]:
        """The best passages, best first. asset: only what is about it or about all; kinds: only these, if any."""

    async def close(self) -> None:
        """Release everything."""


class Embed(Protocol):
    """Turns texts into vectors with a model of the node's own repository."""

    @property
    def model(self) -> str:
        """Which model it is: vectors of two models cannot be compared."""

    async def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, dimensions), rows of length 1."""


class Guard(Protocol):
    """Looks at what goes into or comes out of a language model. Runs in the gateway's process: quick, no waiting."""

    name: str
    stages: Sequence[Stage]
    """Where it is asked. `input`: each message, passage and field by itself. `model`: once a request, with the system
    prompt (empty where there is none); `Verdict.text` is the prompt to send. `output`: the answer."""

    def check(self, stage: Stage, text: str, context: GuardContext) -> Verdict:
        """Judge one text. One that raises counts as a refusal, and is reported."""


@runtime_checkable
class StreamingGuard(Guard, Protocol):
    """An output guard that can judge an answer while it comes."""

    def stream(self, context: GuardContext) -> AnswerStream:
        """Begin with one answer. What its verdicts let out, put together, is what `check` says of the whole answer; and
        it refuses if, and only if, `check` would.
        """


@runtime_checkable
class ConsideringGuard(Guard, Protocol):
    """A guard that can take a second opinion, of the node's language model."""

    async def consider(self, stage: Stage, text: str, context: GuardContext, complete: Complete) -> Verdict:
        """Judge one text that `check` has not refused, with the model's help or, where it is not worth it, without.

        Only for texts that nobody waits for character by character: never for a streamed answer. `complete` must not
        lead through this guard again. Raises nothing of `complete`: without an opinion the text passes.
        """


class LanguageServer(Protocol):
    """A process that serves a language model with OpenAI's API on loopback. The core starts it, proves it by a real
    completion, watches it, starts it again, and stops it.
    """

    name: str
    formats: Sequence[str]
    """What it can serve: `gguf`, `huggingface`, `edgellm`."""
    abilities: frozenset[Ability]

    def missing(self) -> str:
        """Why it cannot run on this machine, with the remedy; empty where it can. Must be quick."""

    def command(self, launch: Launch) -> Command:
        """How to start it. Raises ConfigError or ModelError where the launch cannot be, naming key and remedy."""

    def figures(self, metrics: str) -> ServerFigures:
        """What its own page `/metrics` says (Prometheus text)."""


@runtime_checkable
class TunableServer(LanguageServer, Protocol):
    """A server that can serve a model in several ways; `millhand model build` measures which of them pays on a node. It
    has llama.cpp's pages /apply-template and /completion, with tokens and timings.
    """

    speculations: Sequence[Speculation]
    """What `Launch.speculation` may be, `none` left out."""

    def programs(self) -> Mapping[str, str]:
        """The programs that can be started here, the one that is taken by default first: name -> its release. Another
        release is measured anew.
        """


# ---- hooks ----------------------------------------------------------------------------------------------------------


class Hooks:
    """Every hook; all are optional for a plugin."""

    @hookspec
    def millhand_config(self) -> type[BaseModel]:  # type: ignore[empty-body]
        """Return the pydantic model of the plugin's table `[plugins.<name>]`. Called once, before every other hook."""

    @hookspec
    def millhand_adapters(self, config: Any) -> Sequence[AdapterKind]:  # type: ignore[empty-body]
        """Return the kinds of adapter that this plugin brings."""

    @hookspec
    def millhand_backends(self, config: Any) -> Sequence[Backend]:  # type: ignore[empty-body]
        """Return backends. Called in a worker process, where heavy imports are allowed inside `load`."""

    @hookspec
    def millhand_makers(self, config: Any) -> Sequence[Maker]:  # type: ignore[empty-body]
        """Return makers of candidates: engine builders and quantizers. Called in the workshop's processes too."""

    @hookspec
    def millhand_evaluations(self, config: Any) -> Sequence[Evaluation]:  # type: ignore[empty-body]
        """Return what models are judged by; called in the workshop's processes too. One for a model wins."""

    @hookspec
    def millhand_extractors(self, config: Any) -> Sequence[FeatureExtractor]:  # type: ignore[empty-body]
        """Return feature extractors that model.toml files may name."""

    @hookspec
    def millhand_models(self, config: Any) -> Sequence[Path]:  # type: ignore[empty-body]
        """Return folders of models that the plugin ships (each holds `<model>/model.toml`)."""

    @hookspec
    def millhand_order_writers(self, config: Any) -> Sequence[OrderWriter]:  # type: ignore[empty-body]
        """Return order writers; config picks one by name."""

    @hookspec
    def millhand_order_revisers(self, config: Any) -> Sequence[OrderReviser]:  # type: ignore[empty-body]
        """Return order revisers; config picks one by name."""

    @hookspec
    def millhand_knowledge(self, config: Any) -> KnowledgeBase:  # type: ignore[empty-body]
        """Return the knowledge base; one plugin's wins."""

    @hookspec
    def millhand_sinks(self, config: Any) -> Sequence[Sink]:  # type: ignore[empty-body]
        """Return sinks. Each keeps its own cursor in the store; the core retries with back-off."""

    @hookspec
    def millhand_guards(self, config: Any) -> Sequence[Guard]:  # type: ignore[empty-body]
        """Return guards for language models; called in the gateway's processes."""

    @hookspec
    def millhand_language_servers(self, config: Any) -> Sequence[LanguageServer]:  # type: ignore[empty-body]
        """Return language servers."""

    @hookspec
    def millhand_profiles(self, config: Any) -> Sequence[Path]:  # type: ignore[empty-body]
        """Return folders of `<board>.toml` profiles."""
