"""Questions and media: record schemas and converters, decoding, and prompts."""
