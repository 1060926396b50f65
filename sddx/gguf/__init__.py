"""GGUF files as models: dequantised once, with the file's own tokenizer."""
