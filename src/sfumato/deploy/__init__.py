"""Models in use: what runs where, in which memory."""
