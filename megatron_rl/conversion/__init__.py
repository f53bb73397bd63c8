"""Convert Hugging Face folders to Megatron checkpoints and back: streamed, parallel and atomic."""
