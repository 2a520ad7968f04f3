"""Chat: API messages to a prompt, in DeepSeek's encoding or by a chat template, and a streamed reply to its parts."""
