"""Time a kernel at Llama-3.1-8B's shapes on one GPU, beside what a user would otherwise call."""
