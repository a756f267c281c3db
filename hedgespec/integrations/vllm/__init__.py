"""HedgeSpec inside other engines: `vllm.py` is the one there is. Nothing here is imported unless an engine asks for it."""
