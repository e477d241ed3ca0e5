"""The small world: scenes with exact ground truth, a base model that draws them, and five rewards that read pixels."""
