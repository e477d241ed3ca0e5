"""The small world: scenes with exact ground truth, a base model that draws them, and eight rewards that read pixels."""
