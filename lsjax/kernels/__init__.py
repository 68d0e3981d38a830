"""Forms of the model's operations that are tuned for a platform (lsjax/platforms.py).

Each stands behind one function, which decides by the table of platforms. Where the model has a
plain form, the function gets it as `reference`: it is used where no tuned form fits.
"""
