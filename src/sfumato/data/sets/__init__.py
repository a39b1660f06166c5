"""Sets of images that are built from packages, one file a set: `sfumato data NAME`."""
