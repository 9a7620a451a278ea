"""Engines: batches of uint8 windows -> probabilities. Know no HTTP and no queue."""
