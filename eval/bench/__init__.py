"""The papers' tables, one file a table: methods trained, sampled and measured alike, with intervals over seeds."""
