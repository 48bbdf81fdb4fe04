"""The second line: what the model is told, which tools it may be offered, who must bind the answer to a schema."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from millhand.language.guarding import GuardContext, Stage, Verdict
from millhand_plugins.guard.settings import ModelTable


class PolicyGuard:
    name = "guard.model"
    stages: Sequence[Stage] = ("model",)

    def __init__(self, settings: ModelTable) -> None:
        self._settings = settings

    def check(self, stage: Stage, text: str, context: GuardContext) -> Verdict:
        for tool in context.tools:
            if not any(fnmatchcase(tool, pattern) for pattern in self._settings.allowed_tools):
                reason = f"the tool '{tool}' is not among allowed_tools of [plugins.guard.model]"
                return Verdict(action="refuse", text=text, rule="tools.not_allowed", reason=reason)
        if context.role in self._settings.guided_roles and not context.guided:
            reason = f"the role '{context.role}' must give a JSON schema (response_format) for the answer"
            return Verdict(action="refuse", text=text, rule="guided.required", reason=reason)
        if not self._applies(context) or text.startswith(self._settings.policy):
            return Verdict(action="pass", text=text)
        told = f"{self._settings.policy}\n\n{text}" if text else self._settings.policy
        return Verdict(action="change", text=told, rule="policy.added", reason="the node's policy was put before it")

    def _applies(self, context: GuardContext) -> bool:
        if context.source == "agent" or not self._settings.policy:
            return False
        wanted = self._settings.policy_for
        return wanted == "all" or (wanted == "grounded" and bool(context.grounds or context.tools))
