"""People's adapters put together: algebra on low-rank factors, and the folders they lie in. No swarm is
needed."""
