"""What a quantizer is: its spec, its grid and arithmetic, range rules and gradient estimators."""
