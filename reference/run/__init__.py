"""A run around its steps: state, checkpoints, records, evaluations, reports."""
