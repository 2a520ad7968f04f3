"""What a served model keeps of the tokens it has read, in pages, and how many bytes that takes."""
