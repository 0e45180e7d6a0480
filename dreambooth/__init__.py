"""The SDXL subject-driven task: configuration, pictures, encoding, draws and loss. Knows nothing of adapters."""
