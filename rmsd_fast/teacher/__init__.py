"""The black-box teacher: its pool of responses, and what the pool's numbers say."""
