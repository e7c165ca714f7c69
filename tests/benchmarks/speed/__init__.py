"""What the operator and the calibration cost, as ratios measured within one run."""
