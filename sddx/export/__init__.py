"""A recovered model as a plain Hugging Face folder, proven equal to what `sddx.load` gives."""
