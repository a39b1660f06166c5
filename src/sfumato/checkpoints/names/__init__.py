"""Two-way tables between our names and those of other layouts."""
