"""Numbers: metrics of drawn images, with their protocols, and reports."""
