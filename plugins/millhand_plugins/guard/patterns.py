"""What must never pass, by its exact form: control tokens of chat templates, commands, links that carry data away.

Each pattern is linear: no nested repetition, and each repetition is bounded or of one class.
"""

from __future__ import annotations

import re

_FORMS: tuple[tuple[str, str], ...] = (
    # Chat templates of the models' families; the bar may be the full-width one of DeepSeek.
    ("injection.control_token", r"<[|｜] {0,2}[a-z_▁/ ]{2,40}[|｜]>"),
    ("injection.control_token", r"\[/?INST\]|<</?SYS>>|</?s>\s{0,3}(?:<|\[|system|user)|<(?:start|end)_of_turn>|<\|"),
    ("injection.control_token", r"</?(?:system|instructions?|assistant|developer|system_prompt)>"),
    ("injection.control_token", r"^#{2,4} {0,2}(?:system|instructions?|response|assistant)\b:? {0,3}$"),
    ("injection.control_token", r"[\"']role[\"']\s{0,3}:\s{0,3}[\"'](?:system|assistant|developer)[\"']"),
    (
        "injection.fake_turn",
        (
            r"^\[?(?:system|developer)(?: message| notice| prompt)?\]?\s{0,2}(?:\(#\w{1,20}\))?:[^\n]{0,80}"
            r"\b(?:you|your|user|restrictions?|filters?|polic(?:y|ies)|comply|ignore|print|reveal|safety)\b"
        ),
    ),
    (
        "injection.fake_turn",
        (
            r"\b(?:user|human|q) {0,2}:[^\n]{1,300}\n\s{0,3}(?:assistant|ai|bot|a) {0,2}:[^\n]{0,300}\n"
            r"[^\n]{0,300}\n?\s{0,3}(?:assistant|ai|bot|a) {0,2}:"
        ),
    ),
    (
        "injection.fake_turn",
        r"\n\s{0,3}(?:assistant|ai) {0,2}: {0,2}(?:sure|of course|certainly|absolutely|okay|gladly|with pleasure)",
    ),
    ("injection.fake_turn", r"\[system (?:notice|message|override)\]|\[jailbreak\]|\[classic\]"),
    (
        "obfuscation.assemble",
        (
            r"\b(?:do|run|execute|follow|obey|perform|carry out|act on)\b[^\n]{0,20}"
            r"\b[a-z]\w{0,8} {0,2}\+ {0,2}[a-z]\w{0,8}\b"
        ),
    ),
    (
        "exfiltration.link",
        r"!\[[^\]\n]{0,80}\]\(\s{0,3}(?:https?:|//|ftp:|mqtts?:|[\w-]{1,60}\.)[^)\s]{0,300}[?&=][^)\n]{0,300}",
    ),
    ("tools.shell", r"\brm {1,3}-[rf]{1,2}\b|\b(?:curl|wget)\b[^\n|]{1,200}\| {0,3}(?:sudo )?(?:ba|z|da)?sh\b"),
    (
        "tools.shell",
        (
            r"\bos\.(?:system|popen|exec)|\bsubprocess\.(?:run|call|popen)|/etc/(?:passwd|shadow)|~/\.ssh"
            r"|\bpowershell(?:\.exe)? -e"
        ),
    ),
    (
        "tools.shell",
        (
            r"['\"]?\s{0,3};\s{0,3}(?:drop|delete|truncate|alter)\s{1,3}(?:table|from|database)\b"
            r"|'\s{0,3}or\s{1,3}'?1'?\s{0,3}=\s{0,3}'?1"
        ),
    ),
    ("tools.shell", r"\{\{[^}\n]{0,100}__[a-z]{3,20}__|__import__\s{0,3}\("),
)
PATTERNS = tuple((name, re.compile(form, re.IGNORECASE | re.MULTILINE)) for name, form in _FORMS)
GATE = re.compile(r"[+<\[#{'\"!|/~;]|__|rm |[a-z] {0,2}:|os\.|subprocess|powershell|curl|wget", re.IGNORECASE)


def form_in(text: str) -> str:
    """The rule of the first form that the text holds; empty for none."""
    if not GATE.search(text):
        return ""
    return next((name for name, pattern in PATTERNS if pattern.search(text)), "")
