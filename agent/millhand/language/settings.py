"""What the owner may say about language models: the table `[language]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from millhand.validation import StrictTable


class LanguageSettings(StrictTable):
    model: str = ""
    """The language model to serve, by the name that it was added under (`millhand model add`); empty serves none."""
    server: str = ""
    """The language server: `llamacpp`, `vllm`, `edgellm` or another plugin's. Empty takes the profile's where it can
    serve the model on this machine, else the first that can."""
    context_tokens: int = Field(default=0, ge=0)
    """Tokens that one conversation may hold, the answer included; 0 takes the profile's. At most the model's."""
    slots: int = Field(default=0, ge=0, le=1024)
    """Conversations that one process answers at once; 0 takes the profile's."""
    threads: int = Field(default=0, ge=0, le=1024)
    """Threads on the CPU; 0 takes what `millhand model build` found to pay, else the profile's."""
    kv_bits: Literal[0, 4, 8, 16] = 0
    """Bits of one number in the KV cache; 0 takes the profile's."""
    speculation: Literal["", "none", "ngram", "ngram-simple", "ngram-mod", "ngram-cache", "draft"] = ""
    """`ngram` drafts what comes from the text itself, for answers that quote, as do llama.cpp's other kinds; `draft`
    has the model named by `draft` do it. Empty takes what `millhand model build` found to pay, else the profile's."""
    draft: str = ""
    """With speculation = "draft": a smaller language model of this node with the same vocabulary, by name."""
    replicas: int = Field(default=0, ge=0, le=64)
    """Processes that serve the same model, each on a GPU or a set of them of its own; 0 takes the profile's."""
    tensor_parallel: int = Field(default=0, ge=0, le=64)
    """GPUs that one process spreads the model over; 0 takes the fewest that hold it, within the profile's limit."""
    start_timeout_s: float = Field(default=300, gt=0, allow_inf_nan=False)
    """A server that is not proved by a completion within this time is ended and started again."""
    hang_s: float = Field(default=120, gt=0, allow_inf_nan=False)
    """A server that does not answer for so long, or has requests and gets nowhere with them, is killed and started
    again. Longer than reading a batch of the prompt takes on a slow CPU."""
    check_s: float = Field(default=2, gt=0, allow_inf_nan=False)
    """How often a server is asked how it is."""
    stop_s: float = Field(default=10, ge=0, allow_inf_nan=False)
    """Between SIGTERM and SIGKILL at a stop."""
    restart_delay_s: float = Field(default=1, gt=0, allow_inf_nan=False)
    """Pause before the first restart; doubled at each further one up to `restart_delay_cap_s`. It is never given up."""
    restart_delay_cap_s: float = Field(default=60, gt=0, allow_inf_nan=False)
    log_bytes_cap: int = Field(default=1 << 20, ge=4096)
    """Size of a server's log, of which one older is kept; and what it may write a minute, the rest is counted."""

    @field_validator("model")
    @classmethod
    def _a_folder(cls, value: str) -> str:
        if value.startswith(".") or "/" in value or "\0" in value:
            raise ValueError("give the name that it was added under, not a path")
        return value

    @model_validator(mode="after")
    def _a_model_that_drafts(self) -> LanguageSettings:
        if (self.speculation == "draft") != bool(self.draft):
            raise ValueError(f"speculation = '{self.speculation}' and draft = '{self.draft}': give both, or neither")
        return self
