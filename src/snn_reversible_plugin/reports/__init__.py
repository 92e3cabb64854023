"""Trust and sight: what a converted network holds, and that it trains as stock does."""
