"""Learning ranks on the loss itself (Dobi-SVD, Algorithm 1): everything but the truncation positions is frozen."""
