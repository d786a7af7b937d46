"""Annotating whole sets: listing, jobs, output, processes and clusters."""
