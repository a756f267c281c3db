"""HedgeSpec inside other engines: vLLM is the only one. Nothing here is imported unless the engine asks for it."""
