"""The stages of a run, each a `step(state, prompts, step, settings) -> StepResult`."""
