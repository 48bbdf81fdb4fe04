"""The gateway: OpenAI's API in front of the node's language servers.

`settings`, `tokens` and `audit` are light, for daemon and CLI. Everything else lives in the gateway's own processes,
which alone import aiohttp; `python -m millhand.serving.openai '<JSON>'` is one (serving/front.py starts, watches and
ends it).
"""
