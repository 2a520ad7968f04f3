"""The full model, its layer stacks, parameter counts, and conversion of Hugging Face configs."""
