"""What the calibration text leaves behind at each linear: collected once, kept, reused for every ratio and method."""
