"""The knowledge base: manuals, parts lists and past orders, found by words and by meaning, with page and line."""

from __future__ import annotations

from millhand.hookspecs import KnowledgeBase, hookimpl
from millhand_plugins.knowledge.settings import KnowledgeConfig


@hookimpl
def millhand_config() -> type[KnowledgeConfig]:
    return KnowledgeConfig


@hookimpl
def millhand_knowledge(config: KnowledgeConfig) -> KnowledgeBase:
    from millhand_plugins.knowledge.base import Knowledge

    return Knowledge(config)
