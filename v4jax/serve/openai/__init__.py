"""The HTTP server: the OpenAI and Anthropic APIs over one `LLM` (extra `serve`)."""
