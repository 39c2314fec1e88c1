"""Questions and their media: schemas and converters, decoding, prompts, made and real clips."""
