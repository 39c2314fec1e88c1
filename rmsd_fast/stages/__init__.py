"""The stages of a run, each with a `step(state, prompts, settings, …) -> StepResult`, and what surrounds them."""
