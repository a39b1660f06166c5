"""Act 3, predict: (x_t, t, conditioning) -> Prediction(x0, eps). Networks, conditioners, guidance
and adapters.
"""
