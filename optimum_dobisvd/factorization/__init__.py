"""Weight + statistics + rank -> two factors. Pure functions on tensors: no module, model or file code."""
