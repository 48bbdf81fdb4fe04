"""A signed webhook: alerts and work orders to a plant's own maintenance system."""

from __future__ import annotations

from collections.abc import Sequence

from millhand.hookspecs import Sink, hookimpl
from millhand_plugins.webhook.settings import WebhookConfig


@hookimpl
def millhand_config() -> type[WebhookConfig]:
    return WebhookConfig


@hookimpl
def millhand_sinks(config: WebhookConfig) -> Sequence[Sink]:
    from millhand_plugins.webhook.sink import WebhookSink

    return [WebhookSink(config)]
