"""Numbers: metrics of drawn pictures, one file a metric, and the report."""
