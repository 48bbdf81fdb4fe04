"""Learned rounding for language models, onto the 4-bit grids of GGUF: the file keeps its server and its speed.

`python -m millhand_plugins.quantize.language SOURCE TARGET --text FILE`. Needs the extra `language-build`.
"""
