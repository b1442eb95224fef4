"""What each matrix becomes for a byte budget. Numbers and spectra only: no model, no module."""
