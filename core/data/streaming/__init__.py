"""Prepared folders: latents, text rows and maps in shards, read in memory that does not grow with the set."""
