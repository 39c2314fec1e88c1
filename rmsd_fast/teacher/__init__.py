"""The black-box teacher: its pool of responses, a simulated one, and what the pool's numbers say."""
