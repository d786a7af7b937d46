"""`prepare`: shards of images in, shards of latents, text rows and maps out."""
