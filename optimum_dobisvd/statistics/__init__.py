"""Statistics of every linear on the calibration text: collected once, stored, reused for every ratio and method."""
