"""Models behind processes: manifest, repository, worker protocol, workers, HTTP."""
