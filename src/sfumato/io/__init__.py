"""Files: atomic writes, safetensors, pickles, and the memory that mapped files take."""
