"""Data sets: listing records, checking, decoding, caching and serving them."""
