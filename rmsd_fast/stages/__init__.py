"""The stages of a run, each with a `step(state, prompts, settings, …) -> StepResult`, and the code around them."""
