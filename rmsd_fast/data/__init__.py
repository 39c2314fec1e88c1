"""Questions and their media: schemas and converters, decoding, prompts."""
