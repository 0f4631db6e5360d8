"""FID, sFID, Inception Score, precision and recall by ADM's protocol, and the digit classifier of the small scale."""
