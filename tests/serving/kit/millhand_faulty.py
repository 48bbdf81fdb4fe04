"""Backends that go wrong on demand, as a stranger's plugin might. The first input value says what happens.

0: identity. 1: the process dies of SIGSEGV. 2: hangs for good. 3: raises. 4: gives too few rows. 5: takes 200 ms.
"""

import ctypes
import json
import os
import signal
import time
from pathlib import Path

import numpy as np

from millhand.errors import AcceleratorError, ModelError, WorkerError
from millhand.hookspecs import hookimpl


class Session:
    inputs = {"x": ("float32", (-1, 2))}
    outputs = {"y": ("float32", (-1, 2))}

    def run(self, inputs):
        x = inputs["x"]
        action = int(x[0, 0])
        if action == 1:
            ctypes.string_at(0)
        if action == 2:
            time.sleep(3600)
        if action == 3:
            raise RuntimeError("the native library said no")
        if action == 4:
            return {"y": x[:-1]}
        if action == 5:
            time.sleep(0.2)
        return {"y": x}

    def close(self):
        self.weights = None


class Backend:
    name = "faulty"
    suffixes = (".json",)

    def load(self, artifact, accelerator, options):
        action = json.loads(artifact.read_text()).get("load", "")
        if action.startswith("gate"):  # as another action, once the file is there: `gate <action> <file>`
            _, action, path = action.split()
            action = action if Path(path).exists() else ""
        if action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "hang":
            time.sleep(3600)
        if action == "raise":
            raise RuntimeError("the native library said no")
        session = Session()
        if action.startswith("hold"):
            session.weights = np.ones(int(action.split()[1]) << 20, dtype=np.uint8)
        return session


class TriedBackend(Backend):
    """Says of its trials what the artifact's options tell: {"raise": text}."""

    name = "tried"

    def trials(self, accelerator, options):
        raise RuntimeError(options["raise"])


class VramBackend(Backend):
    """Holds that much memory of the GPU, through the driver's own library: {"hold": MiB}."""

    name = "vram"

    def load(self, artifact, accelerator, options):
        return VramSession(json.loads(artifact.read_text())["hold"] << 20)


class VramSession(Session):
    def __init__(self, size):
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.context, self.memory = ctypes.c_void_p(), ctypes.c_uint64()
        self.ask("cuInit", 0)
        self.ask("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), 0)
        self.ask("cuCtxSetCurrent", self.context)
        self.ask("cuMemAlloc_v2", ctypes.byref(self.memory), ctypes.c_size_t(size))

    def ask(self, function, *arguments):
        status = getattr(self.cuda, function)(*arguments)
        if status:
            raise ModelError(f"{function} gave {status}")

    def close(self):
        self.ask("cuCtxSetCurrent", self.context)
        self.ask("cuMemFree_v2", self.memory)
        self.ask("cuDevicePrimaryCtxRelease_v2", 0)


class ThreadedBackend(Backend):
    """The artifact says for each number of threads how long a run takes: {"1": 8.0, "2": 4.5}, ms."""

    name = "threaded"
    threaded = True

    def load(self, artifact, accelerator, options):
        session = TimedSession()
        session.run_s = json.loads(artifact.read_text())[str(options["threads"])] / 1e3
        return session


class TimedSession(Session):
    concurrent = True

    def run(self, inputs):
        time.sleep(self.run_s)
        return {"y": inputs["x"]}


class SlowSumBackend:
    """y = x plus the batch's number of rows in a second output, after 2 ms; to see batches from outside."""

    name = "rows"
    suffixes = (".json",)

    def load(self, artifact, accelerator, options):
        return RowsSession()


class RowsSession(Session):
    outputs = {"y": ("float32", (-1, 2)), "rows": ("int64", (-1, 1))}

    def run(self, inputs):
        time.sleep(0.002)
        x = inputs["x"]
        return {"y": x * 2, "rows": np.full((len(x), 1), len(x), dtype=np.int64)}


class DeclaredBackend(Backend):
    """Takes its shapes from model.toml; its session waits for something outside that is away while `gate` is missing.

    y = the milliseconds left until the deadline, 0 for none.
    """

    name = "declared"

    def load_declared(self, artifact, accelerator, options, inputs, outputs):
        return OutsideSession(artifact.parent / "gate", inputs, outputs)


class OutsideSession(Session):
    def __init__(self, gate, inputs, outputs):
        self.gate, self.inputs, self.outputs = gate, inputs, outputs
        self.counts = {"runs": 0}

    def run_until(self, inputs, deadline_ns):
        self.counts["runs"] += 1
        if not self.gate.exists():
            raise WorkerError("the outside is away")
        left_ms = (deadline_ns - time.monotonic_ns()) / 1e6 if deadline_ns else 0
        return {"y": np.full_like(inputs["x"], left_ms)}


class ProvingBackend(Backend):
    """Its session proves an accelerator; an artifact that says `fall back` makes it find the CPU instead."""

    name = "proving"

    def load(self, artifact, accelerator, options):
        return AcceleratedSession(artifact)


class AcceleratedSession(Session):
    def __init__(self, artifact):
        self.artifact = artifact
        self.proof = {}
        self.runs = []

    def prove(self, inputs, max_batch):
        if self.artifact.read_text() == "fall back":
            raise ModelError("all nodes ran on the CPU", hint="mend the driver")
        self.runs.append("prove")
        self.told = (list(inputs), max_batch)
        ways = {"1": {"way": "graph"}, "8": {"way": "graph"}, "64": {"way": "plain"}}
        self.proof = {"provider": "Fast", "nodes": 3, "gpu_nodes": 2, "max_difference": 1.25e-6, "ways": ways}

    def run(self, inputs):
        self.runs.append("run")
        return super().run(inputs)

    def close(self):
        self.artifact.with_name("closed").touch()


class CardBackend(Backend):
    """Needs a card: a file named after the accelerator, in the folder that the artifact names ({"cards": folder}).

    y = x * 3 as long as it is there. One that goes away fails every run, and every load, as CUDA does.
    """

    name = "card"

    def load(self, artifact, accelerator, options):
        card = Path(json.loads(artifact.read_text())["cards"]) / accelerator
        if not card.exists():
            raise ModelError(f"CUDA failure 100: no CUDA-capable device is detected ({card.name})")
        return CardSession(card)


class CardSession(Session):
    def __init__(self, card):
        self.card = card

    def run(self, inputs):
        time.sleep(0.001)
        if not self.card.exists():
            raise AcceleratorError(f"CUDA failure 719: unspecified launch failure ({self.card.name})")
        return {"y": inputs["x"] * 3}


class Keyed:
    """Makes nothing here; tells what MILLHAND_TEST_KEY holds (JSON): a key, or what happens when it is asked."""

    name = "keyed"

    def recipes(self, target):
        return []

    def make(self, recipe, job):
        raise ModelError("it makes nothing")

    def key(self, target):
        print("a native library prints what it likes")
        key = json.loads(os.environ["MILLHAND_TEST_KEY"])
        if "die" in key:
            ctypes.string_at(0)
        if "hang" in key:
            time.sleep(3600)
        if "raise" in key:
            raise ModelError("there is no driver", hint="install one")
        return {**key, "target": target.name}


class Keyless:
    name = "keyless"
    recipes = Keyed.recipes
    make = Keyed.make


@hookimpl
def millhand_makers():
    return [Keyed(), Keyless()]


@hookimpl
def millhand_backends():
    shown = [Backend(), ThreadedBackend(), VramBackend(), SlowSumBackend(), DeclaredBackend(), ProvingBackend()]
    return [*shown, CardBackend(), TriedBackend()]
