"""FID, sFID, Inception Score, precision and recall by ADM's protocol, and the classifiers of the small worlds."""
