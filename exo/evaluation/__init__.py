"""Compare the answers of systems: metrics, win rates, a judge, and human raters."""
