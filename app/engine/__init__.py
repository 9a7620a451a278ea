"""Engines: a batch of uint8 windows -> probabilities. Know no HTTP, and no files but their own."""
