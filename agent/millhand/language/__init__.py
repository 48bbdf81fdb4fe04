"""Language models: their servers, what the agent asks them, and what stands around their answers."""
