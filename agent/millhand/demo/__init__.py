"""The main job in one command: a rig fails, the agent sees it coming, an order appears, every reading arrives."""
